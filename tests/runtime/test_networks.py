"""Whole networks: those for CIFAR in `torch_feather.models`, and networks of timm."""

import pytest
import timm
import torch
from runtime_cases import DENSE, SPARSE, compiled, error, pruned

from torch_feather import models
from torch_feather.runtime.plan import Torch

TOLERANCE = 1e-4  # relative to the largest output


def check(model, size, batches, sparsity):
    model = pruned(model, sparsity)
    inputs = [torch.randn(batch, 3, size, size) for batch in batches]
    network = compiled(model, inputs[0])
    with torch.no_grad():
        for x in inputs:
            assert error(network(x), model(x)) < TOLERANCE
    return network


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v1", "densenet40_24"])
def test_networks_for_cifar(name):
    """All convolutions, norms and ReLUs run in machine code."""
    network = check(getattr(models, name)(num_classes=10), 32, [2], 0.95)
    functions = {str(s.node.target) for s in network.plan.steps if isinstance(s, Torch)}
    assert not any("conv" in f or "norm" in f or "relu" in f for f in functions)
    assert all(layer == SPARSE for layer in network.tuning.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batches"),
    [
        ("resnet18", [1, 3, 1]),
        ("resnet50", [1, 3, 1]),
        ("mobilenetv1_100", [1, 3, 1]),
        # torch.export captures it for several images or for one
        ("convnext_nano", [3, 2]),
        ("vit_small_patch16_224", [1, 3, 1]),
    ],
)
def test_networks_of_timm(name, batches):
    network = check(timm.create_model(name, num_classes=10), 224, batches, 0.9)
    assert DENSE not in network.tuning.values()
