"""Rare cases in which weights could be lost or a wrong state loaded."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import torch_feather as feather
from torch_feather import ConfigurationError, StateError
from torch_feather.schedules import Cubic


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12))


def sgd(*parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def train(model, optimizers, steps=4):
    for _ in range(steps):
        model(torch.randn(8, 12)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture
def pair():
    """A trained model under two optimizers, its sparsifier, and their states."""
    model = network()
    optimizers = [sgd(*model[0].parameters()), sgd(*model[2].parameters())]
    sparsifier = feather.sparsify(model, optimizers, sparsity=0.8, total_steps=8)
    train(model, optimizers)
    return model, optimizers, sparsifier, copy.deepcopy([o.state_dict() for o in optimizers])


def assert_latents(sparsifier, expected):
    for name, latent in sparsifier.latent_weights().items():
        assert torch.equal(latent, expected[name]), name


def test_relaxed_loading_of_one_optimizer_leaves_the_other_alone(pair):
    model, optimizers, sparsifier, states = pair
    expected = sparsifier.latent_weights()
    train(model, optimizers, 2)
    with sparsifier.relaxed_loading():
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
    assert_latents(sparsifier, expected)


def test_loading_one_optimizer_does_not_undo_a_write_to_the_other(pair):
    model, optimizers, sparsifier, states = pair
    with torch.no_grad():
        model[2].weight[0, 0] = 5.0
    optimizers[0].load_state_dict(states[0])
    assert sparsifier.latent_weights()["2.weight"][0, 0] == 5.0


def test_effective_weights_of_another_device_are_not_an_external_write(pair):
    """Their last bits may differ; the header has the checksum of the saved ones."""
    model, optimizers, sparsifier, _ = pair
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.where(layer.weight == 0, 0.0, layer.weight * (1 + 1e-6)))
    elsewhere = copy.deepcopy(model.state_dict())
    expected = sparsifier_latents(pair)
    saved = resaved(pair, elsewhere)
    for optimizer, state in zip(optimizers, saved, strict=True):
        optimizer.load_state_dict(state)
    model.load_state_dict(elsewhere)
    assert_latents(sparsifier, expected)


def sparsifier_latents(pair):
    return {
        f"{2 * i}.weight": state["state"][0]["feather_latent"] for i, state in enumerate(pair[3])
    }


def resaved(pair, effective):
    """The states as saved by another device: with checksums of its effective weights."""
    from torch_feather.engine.checkpoint import Header
    from torch_feather.weights.checksum import checksum

    states = copy.deepcopy(pair[3])
    for i, state in enumerate(states):
        entries = state["state"][0]
        header = Header.read(entries["feather_header"])
        image = checksum(effective[f"{2 * i}.weight"])
        entries["feather_header"] = header._replace(image=image).tensor()
    return states


def test_a_raising_step_after_finalize_keeps_later_training():
    model = network()
    optimizer = sgd(*model.parameters())
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.8, total_steps=4)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps our wrapped step
    train(model, [optimizer])
    sparsifier.finalize(keep_masks=True)
    train(model, [optimizer])
    scheduler.step()
    before = model[0].weight.detach().clone()

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(model[0].weight, before)


def test_zeros_can_be_kept_after_a_restart():
    model = network()
    optimizer = sgd(*model.parameters())
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.8, total_steps=4)
    train(model, [optimizer])
    sparsifier.finalize()
    kept = feather.sparsity(model)
    keeper = feather.keep_zeros(model, optimizer)
    train(model, [optimizer])
    assert feather.sparsity(model) == kept
    keeper.remove()
    train(model, [optimizer], 1)
    assert feather.sparsity(model) < kept


def test_zeros_that_no_optimizer_keeps_are_an_error():
    model = network()
    optimizer = sgd(*model[0].parameters())
    with pytest.raises(ConfigurationError, match=r"No optimizer holds 2\.weight"):
        feather.keep_zeros(model, optimizer)
    model[2].requires_grad_(False)  # nobody trains it
    feather.keep_zeros(model, optimizer)


def test_two_phase_optimizers_outside_of_step_are_an_error():
    from pytorch_optimizer import SAM

    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    feather.sparsify(model, optimizer, sparsity=0.8, total_steps=4)
    model(torch.randn(8, 12)).sum().backward()
    with pytest.raises(StateError, match=r"step\(closure\)"):
        optimizer.first_step(zero_grad=True)


class HalfWay:
    """A schedule of another package, without a repr."""

    def table(self, total_steps):
        return (torch.arange(total_steps + 1) >= total_steps // 2).double()


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        ({"p": 3}, {"p": 3.0}),
        ({"theta": 1}, {"theta": 1.0}),
        ({"end": 4}, {"end": None}),
        ({"schedule": Cubic()}, {}),
        ({"schedule": HalfWay()}, {"schedule": HalfWay()}),
    ],
    ids=["p", "theta", "end", "schedule by name", "schedule without repr"],
)
def test_equal_options_have_one_fingerprint(saved, now):
    model = network()
    optimizer = sgd(*model.parameters())
    feather.sparsify(model, optimizer, sparsity=0.8, total_steps=8, **saved)
    state = optimizer.state_dict()
    other = network()
    optimizer = sgd(*other.parameters())
    feather.sparsify(other, optimizer, sparsity=0.8, total_steps=8, **now)
    optimizer.load_state_dict(state)


def test_a_state_with_more_prunable_layers_is_an_error():
    model = network()
    optimizer = sgd(*model.parameters())
    feather.sparsify(model, optimizer, sparsity=0.8, total_steps=8)
    state = optimizer.state_dict()
    other = network()
    optimizer = sgd(*other.parameters())
    feather.sparsify(other, optimizer, sparsity=0.8, total_steps=8, exclude="2.weight")
    with pytest.raises(StateError, match="parameter 2 of group 0, which are not prunable now"):
        optimizer.load_state_dict(state)


def test_an_unfit_state_found_by_sparsify_leaves_no_hooks():
    model = network()
    optimizer = sgd(*model.parameters())
    feather.sparsify(model, optimizer, sparsity=0.8, total_steps=8)
    train(model, [optimizer])
    state, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    other = network()
    other.load_state_dict(weights)
    optimizer = sgd(*other.parameters())
    optimizer.load_state_dict(state)
    with pytest.raises(StateError, match="total_steps is 8, now 9"):
        feather.sparsify(other, optimizer, sparsity=0.8, total_steps=9)
    assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())
    assert "step" not in vars(optimizer)
    feather.sparsify(other, optimizer, sparsity=0.8, total_steps=8)


def test_filters_apply_to_groups_added_later():
    model = nn.Sequential(
        nn.Linear(12, 12), nn.utils.parametrizations.weight_norm(nn.Linear(12, 5))
    )
    optimizer = sgd(*model[0].parameters())
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.5, total_steps=4, exclude="1.*")
    late = list(model[1].parameters())
    optimizer.add_param_group({"params": late})
    before = [p.detach().clone() for p in late]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # excluded weights are dense on purpose
        train(model, [optimizer])
    assert list(sparsifier.masks()) == ["0.weight"]
    assert int((model[0].weight == 0).sum()) == 72
    for p, old in zip(late, before, strict=True):
        assert (p != old).all()
        assert (p != 0).all()


@pytest.mark.parametrize("table", [[0.0, 0.5, 0.99], [0.0, 1.0], [0.0, 2.0, 1.0]], ids=str)
def test_an_invalid_schedule_table_is_an_error(table):
    class Wrong:
        def table(self, total_steps):
            return torch.tensor(table, dtype=torch.float64)

    model = network()
    with pytest.raises(ConfigurationError, match="the last is 1"):
        feather.sparsify(
            model, sgd(*model.parameters()), sparsity=0.5, total_steps=2, schedule=Wrong()
        )


def test_numpy_numbers_are_accepted():
    model = network()
    sparsifier = feather.sparsify(
        model, sgd(*model.parameters()), sparsity=np.float32(0.5), total_steps=np.int64(4)
    )
    assert (sparsifier.target, sparsifier.total_steps) == (0.5, 4)


def test_a_removed_group_is_an_error():
    model = network()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    )
    feather.sparsify(model, optimizer, sparsity=0.5, total_steps=4)
    del optimizer.param_groups[1]
    with pytest.raises(StateError, match=r"no longer holds 2\.weight"):
        optimizer.step()


def test_an_average_of_another_model_is_an_error():
    model = network()
    sparsifier = feather.sparsify(model, sgd(*model.parameters()), sparsity=0.5, total_steps=4)
    with pytest.raises(StateError, match="another model"):
        feather.LatentAverage(sparsifier).load_state_dict({})


def test_inactive_bounds_change_nothing():
    effective = []
    for bounds in ({}, {"min_density": 0.001}):
        model = network()
        feather.sparsify(
            model,
            sgd(*model.parameters()),
            sparsity=0.5,
            total_steps=4,
            schedule="constant",
            **bounds,
        )
        effective.append(model[0].weight.detach().clone())
    assert torch.equal(*effective)


def test_an_average_is_copied_into_copies_only():
    """What does not take every value unchanged is refused, and not written."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    sparsifier = feather.sparsify(model, sgd(*model.parameters()), sparsity=0.5, total_steps=4)
    average = feather.LatentAverage(sparsifier)
    wrong = {
        r"it has no 0\.weight": nn.Linear(8, 8),
        r"it has no 1\.running_mean": nn.Sequential(model[0], nn.LayerNorm(8), model[2]),
        r"2\.weight has shape \(5, 8\)": nn.Sequential(model[0], model[1], nn.Linear(8, 5)),
        r"is torch\.float16, not torch\.float32": model,
        r"has no values": copy.deepcopy(model).to("meta"),
    }
    for message, other in wrong.items():
        other = copy.deepcopy(other)
        other = other.half() if "float16" in message else other
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ConfigurationError, match=message):
            average.copy_to(other)
        if "values" not in message:
            assert all(torch.equal(value, before[k]) for k, value in other.state_dict().items())
    assert int((average.copy_to(copy.deepcopy(model))[0].weight == 0).sum()) == 0
