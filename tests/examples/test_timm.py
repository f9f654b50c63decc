"""timm: optimizers with layer decay, schedulers, averages and checkpoints."""

import copy

import pytest
import torch
from example_cases import load, spy_on
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import torch_feather as feather
from torch_feather.errors import ConfigurationError

pytestmark = pytest.mark.apps
example = load("timm_loop")
EPOCHS, STEPS = 4, 4


@pytest.fixture
def few_images(monkeypatch):
    images, labels = example.digits()
    monkeypatch.setattr(example, "digits", lambda: (images[:128], labels[:128]))


def test_a_killed_run_resumes_bitwise_identically_from_its_checkpoint(
    few_images, tmp_path, killed_at
):
    def train(folder):
        return example.train(tmp_path / folder, EPOCHS)

    expected = train("whole")
    # Called at the start and after each step: this is within the third epoch.
    killed_at(CosineLRScheduler, "step_update", 1 + 2 * STEPS + 2, lambda: train("run"))
    with spy_on(CosineLRScheduler, "step_update") as updates:
        resumed = train("run")
    assert updates.call_count == 1 + 2 * STEPS  # only the last two epochs
    for model, other in zip(expected, resumed, strict=True):
        assert feather.sparsity(model) == feather.sparsity(other) == pytest.approx(0.9, abs=1e-4)
        for (name, a), b in zip(
            model.state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name


def make(opt="adamw", **options):
    model = feather.models.create("timm/test_vit", 10, 1)
    optimizer = create_optimizer_v2(model, opt=opt, lr=1e-2, weight_decay=0.05, **options)
    return model, optimizer


def test_an_average_of_sparse_weights_is_dense_and_one_of_latent_weights_is_sparse():
    model, optimizer = make()
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.9, total_steps=6)
    dense, sparse = ModelEmaV3(model, decay=0.5), feather.LatentAverage(sparsifier, decay=0.5)
    for _ in range(6):
        model(torch.randn(2, 1, 160, 160)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        dense.update(model)
        sparse.update()
    assert feather.sparsity(dense.module) < 0.5
    average = sparse.copy_to(copy.deepcopy(model))
    assert feather.sparsity(average) == feather.sparsity(model) == pytest.approx(0.9, abs=1e-4)


def test_layer_decay_scales_the_steps_of_the_latent_weights():
    """The first SGD step changes each weight by its own learning rate times its gradient."""
    model, optimizer = make("sgd", layer_decay=0.5, momentum=0.0, nesterov=False)
    rates = {
        id(p): group["lr"] * group["lr_scale"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    CosineLRScheduler(optimizer, t_initial=6, t_in_epochs=False).step_update(0)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.9, total_steps=6)
    before = sparsifier.latent_weights()
    model(torch.randn(2, 1, 160, 160)).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, after in sparsifier.latent_weights().items():
        rate = rates[id(model.get_parameter(name))]
        torch.testing.assert_close(after, before[name] - rate * gradients[name])
    assert len(set(rates.values())) > 2


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lion", "adan", "nadamw", "muon"])
def test_optimizers_of_timm_train_with_exact_zeros(name):
    model, optimizer = make(name)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.9, total_steps=2)
    for _ in range(2):
        model(torch.randn(2, 1, 160, 160)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    n = sparsifier.step.training.weights.size
    assert feather.sparsity(sparsifier.finalize()) == round(0.9 * n) / n


def test_lookahead_is_not_supported():
    model, optimizer = make("lookahead_adamw")
    with pytest.raises(ConfigurationError, match="Lookahead"):
        feather.sparsify(model, optimizer, sparsity=0.9, total_steps=2)


def test_the_example_runs(capsys):
    example.main(epochs=2)
    output = capsys.readouterr().out
    assert output.count("90.00% of the weights are zero") == 2
