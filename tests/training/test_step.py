"""One training step."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_feather as feather
from torch_feather import models
from torch_feather.training.config import Config, apply
from torch_feather.training.data import Batch
from torch_feather.training.distributed import Ranks
from torch_feather.training.step import Step
from torch_feather.training.task import make_optimizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
METHODS = ["dense", "feather", "gmp", "st3", "asl", "probmask"]


def make_step(method, device, options=None, **settings):
    config = apply(Config(), {"method": method, "batch_size": 8} | settings, "test")
    with device:
        model = models.resnet8(10)
    optimizer = make_optimizer(model, config.optimizer)
    sparsifier = None
    if method != "dense":
        target = {"sparsity": 0.9, "total_steps": 10}
        sparsifier = feather.sparsify(model, optimizer, method, **target, **(options or {}))
    return Step(model, optimizer, sparsifier, config, device, Ranks())


def make_batch(device):
    return Batch(torch.randn(8, 3, 8, 8, device=device), torch.randint(10, (8,), device=device), 8)


def take_passes(monkeypatch, sparsifier, count):
    """Let a step take `count` passes, whatever the method asks for."""
    passes = sparsifier.passes
    monkeypatch.setattr(sparsifier, "passes", lambda: passes(count))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_synchronizes_the_device(without_gpu, monkeypatch, method):
    """On fake CUDA tensors, reading a value raises."""

    def backward(loss):  # autograd requires a device
        assert loss.device.type == "cuda"
        for p in step.model.parameters():
            gradient = torch.randn_like(p)
            for pull_back in (p._backward_hooks or {}).values():
                gradient = pull_back(gradient)
            p.grad = gradient if p.grad is None else p.grad + gradient

    with FakeTensorMode(allow_non_fake_inputs=True):
        step = make_step(method, CUDA, **{"system.micro_batch": 3, "optimizer.clip": 3.0})
        monkeypatch.setattr(torch.Tensor, "backward", backward)
        if step.sparsifier is not None:
            take_passes(monkeypatch, step.sparsifier, 2)
        for _ in range(3):
            step(make_batch(CUDA), 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_clipping_covers_all_gradients_of_the_step(monkeypatch, method):
    step, seen = make_step(method, CPU), []

    def clip(parameters, largest):
        seen.append([p.grad for p in parameters])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    step(make_batch(CPU), 0.1)
    own = 0
    if step.sparsifier and step.sparsifier.clips_own_parameters:
        own = len(step.sparsifier.parameters())
    assert len(seen[0]) == len(list(step.model.parameters())) + own
    assert all(gradient is not None for gradient in seen[0])


@pytest.mark.parametrize(
    ("method", "options"),
    [("asl", {}), ("asl+", {"schedule": "constant"}), ("feather-asl+", {"schedule": "constant"})],
)
def test_a_penalty_does_not_change_the_clipping_of_weights(method, options):
    weights, thresholds = [], []
    for budget_weight in (1, 1000):
        torch.manual_seed(0)
        step = make_step(method, CPU, options=options | {"budget_weight": budget_weight})
        step(make_batch(CPU), 0.1)
        weights.append(step.sparsifier.latent_weights().values())
        thresholds.append(step.sparsifier.parameters()[0])
    assert all(map(torch.equal, *weights))
    assert not torch.equal(*thresholds)


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_a_step_may_take_several_passes(monkeypatch, micro_batch):
    """Without random masks several passes equal one, and the loss counts each image once."""
    one, three = (make_step("feather", CPU, **{"system.micro_batch": micro_batch}) for _ in "ab")
    three.model.load_state_dict(one.model.state_dict())
    take_passes(monkeypatch, three.sparsifier, 3)
    batch = make_batch(CPU)
    for step in (one, three):
        # Each pass updates the statistics of batch norms; the gradients do not depend on them.
        step(batch, 0.1)
    torch.testing.assert_close(three.loss_sum, one.loss_sum)
    for p, q in zip(one.model.parameters(), three.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
