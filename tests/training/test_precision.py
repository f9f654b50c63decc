"""Autocast in the trainer."""

import pytest
import torch
from torch import nn

from torch_feather.training.precision import autocast

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), torch.float32),
        (nn.Conv2d(8, 16, 3, groups=8, bias=False), torch.float32),
        (nn.Conv2d(8, 8, 3, groups=4), torch.bfloat16),
        (nn.Conv2d(8, 8, 3), torch.bfloat16),
        (nn.Linear(6, 4), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_only_depthwise_convolutions_stay_in_float32_on_cpus(layer, dtype, compiled):
    network = torch.compile(layer) if compiled else layer
    with autocast(CPU, True):
        y = network(torch.randn(2, 8, 6, 6))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_a_depthwise_convolution_equals_that_of_the_layer_without_autocast():
    layer = nn.Conv2d(8, 8, 3, groups=8)
    x = torch.randn(2, 8, 6, 6).bfloat16()
    with autocast(CPU, True):
        y = layer(x)
    assert torch.equal(y, layer(x.float()))


def test_a_convolution_of_one_channel_is_not_depthwise():
    with autocast(CPU, True):
        assert nn.Conv2d(1, 8, 3)(torch.randn(2, 1, 6, 6)).dtype == torch.bfloat16


def test_without_autocast_nothing_changes():
    with autocast(CPU, False):
        assert nn.Conv2d(8, 8, 3)(torch.randn(2, 8, 6, 6)).dtype == torch.float32


def test_autocast_is_restored_afterwards():
    with pytest.raises(ZeroDivisionError), autocast(CPU, True):
        raise ZeroDivisionError
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Conv2d(8, 8, 3, groups=8)(torch.randn(2, 8, 6, 6)).dtype == torch.bfloat16
