"""Layers in machine code compute what PyTorch computes in float64."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import (
    TILE,
    TOLERANCE,
    conv,
    error,
    graph_of,
    run_layer,
    sparse_weight,
    workspace_of_nan,
)
from torch.fx import Graph

from torch_feather.runtime import kernels
from torch_feather.runtime.kernels import Tile
from torch_feather.runtime.layer import Layer, MaxPool
from torch_feather.runtime.plan import Plan, Sparse

FORMS = {  # (channels, out, kernel, height, width, options)
    "1x1": (5, 7, 1, 6, 5, {}),
    "1x1 stride 2": (5, 7, 1, 7, 6, {"stride": 2}),
    "1x1 padded": (3, 4, 1, 5, 4, {"padding": 2}),
    "3x3": (4, 6, 3, 9, 7, {"padding": 1}),
    "3x3 valid": (4, 6, 3, 9, 7, {}),
    "3x3 padded widely": (3, 4, 3, 5, 6, {"padding": 4}),
    "3x3 stride 2": (4, 6, 3, 9, 8, {"padding": 1, "stride": 2}),
    "3x3 stride 3": (3, 5, 3, 11, 10, {"padding": 1, "stride": 3}),
    "stride beyond kernel": (3, 5, 2, 11, 10, {"stride": 3}),
    "strides mixed": (3, 5, 3, 9, 10, {"padding": 1, "stride": (2, 1)}),
    "strides 1 and 3": (3, 5, 3, 9, 10, {"padding": 1, "stride": (1, 3)}),
    "paddings mixed": (3, 5, 3, 9, 10, {"padding": (0, 2)}),
    "5x5": (3, 4, 5, 8, 9, {"padding": 2}),
    "7x7 stride 2": (3, 8, 7, 15, 14, {"padding": 3, "stride": 2}),
    "7x7 of one pixel": (3, 4, 7, 1, 1, {"padding": 3}),
    "even": (3, 4, 4, 8, 9, {"padding": 1}),
    "even stride 2": (3, 4, 2, 8, 9, {"stride": 2}),
    "1x7": (3, 4, (1, 7), 6, 9, {"padding": (0, 3)}),
    "5x2": (3, 4, (5, 2), 9, 6, {"padding": (2, 0), "stride": (1, 2)}),
    "dilated": (3, 4, 3, 11, 12, {"padding": 2, "dilation": 2}),
    "dilated, strided": (3, 4, 3, 13, 12, {"padding": 3, "dilation": (3, 2), "stride": 2}),
    "dilated valid": (3, 4, 3, 13, 12, {"dilation": (3, 5)}),
    "groups": (6, 9, 3, 7, 6, {"padding": 1, "groups": 3}),
    "groups stride 2": (6, 9, 3, 7, 6, {"padding": 1, "groups": 3, "stride": 2}),
    "depthwise": (5, 5, 3, 7, 6, {"padding": 1, "groups": 5}),
    "depthwise, multiplied": (5, 10, 5, 7, 6, {"padding": 2, "groups": 5}),
    "one channel": (1, 1, 3, 7, 6, {"padding": 1}),
    "33 x 17": (3, 4, 3, 33, 17, {"padding": 1}),
    "one row": (3, 4, (1, 3), 1, 19, {"padding": (0, 1)}),
    "one column": (3, 4, (3, 1), 19, 1, {"padding": (1, 0)}),
    "kernel of image size": (3, 4, (6, 5), 6, 5, {}),
    "no nonzeros": (3, 4, 3, 5, 5, {"padding": 1, "sparsity": 1.0}),
    "no nonzeros, strided": (3, 4, 3, 5, 5, {"stride": 2, "sparsity": 1.0}),
    "dense": (3, 4, 3, 5, 5, {"padding": 1, "sparsity": 0.0}),
}


def reference(layer, x, residual=None):
    """Compute a layer in float64 with PyTorch."""
    x, weight = x.double(), layer.weight.double()
    if isinstance(layer, MaxPool):
        y = F.max_pool2d(x, weight.shape[2:], layer.stride, layer.padding, layer.dilation)
    elif layer.linear:
        y = F.linear(x, weight, layer.bias.double())
    else:
        y = F.conv2d(
            x, weight, layer.bias.double(), layer.stride, layer.padding, layer.dilation,
            layer.groups,
        )  # fmt: skip
    if residual is not None:
        y = y + residual.double()
    return y.clamp(layer.low, layer.high)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("form", FORMS)
def test_convolutions(form, batch):
    channels, out, kernel, height, width, options = FORMS[form]
    layer = conv(channels, out, kernel, **options)
    x = torch.randn(batch, channels, height, width)
    expected = reference(layer, x)
    assert error(run_layer(layer, x), expected) < TOLERANCE
    assert error(layer(x), expected) < TOLERANCE  # dense


@pytest.mark.parametrize("seed", range(60))
def test_random_convolutions(seed):
    rng = random.Random(seed)
    kernel = rng.choice([1, 1, 2, 3, 3, 5]), rng.choice([1, 2, 3, 3, 4, 7])
    stride = rng.choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 2), (4, 4)])
    dilation = rng.choice([(1, 1), (1, 1), (2, 1), (3, 2)])
    padding = rng.randrange(kernel[0] + 1), rng.randrange(kernel[1] + 2)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [max(1, r - 2 * p) + rng.randrange(12) for r, p in zip(reach, padding, strict=True)]
    groups = rng.choice([1, 1, 2, 3])
    channels, out = groups * rng.randrange(1, 5), groups * rng.randrange(1, 5)
    layer = conv(
        *(channels, out, kernel),
        sparsity=rng.choice([0.0, 0.5, 0.9, 0.98]),
        stride=stride, padding=padding, dilation=dilation, groups=groups,
        low=rng.choice([-math.inf, 0.0]), high=rng.choice([math.inf, 6.0]),
    )  # fmt: skip
    x = torch.randn(rng.choice([1, 2, 3, 16]), channels, *size)
    residual = [torch.randn_like(layer(x))] * rng.randrange(2)
    tile, threads = rng.choice(kernels.tiles(kernels.host().widths)), rng.choice([1, 1, 2])
    result = run_layer(layer, x, *residual, tile=tile, threads=threads)
    assert error(result, reference(layer, x, *residual)) < TOLERANCE


@pytest.mark.parametrize("adds", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("tile", kernels.tiles(kernels.host().widths), ids=str)
def test_tiles(tile, adds):
    """Tiles that end within a row, overlap, or are larger than the plane."""
    for size, padding in (((9, 7), 1), ((23, 19), 1), ((1, 1), 0)):
        layer = conv(3, 8, 1 + 2 * padding, padding=padding, low=0.0)
        x, residual = torch.randn(2, 3, *size), torch.randn(2, 8, *size)
        inputs = (x, residual) if adds else (x,)
        assert error(run_layer(layer, *inputs, tile=tile), reference(layer, *inputs)) < TOLERANCE


@pytest.mark.parametrize("tile", kernels.tiles(kernels.host().widths), ids=str)
def test_tiles_of_max_pooling(tile):
    layer = MaxPool.create("pool", 3, (3, 3), (2, 2), (1, 1), (1, 1))
    x = torch.randn(2, 3, 23, 19) - 5
    assert torch.equal(run_layer(layer, x, tile=tile), F.max_pool2d(x, 3, 2, 1))


BOUNDS = {
    "none": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0),
    "clamp": (-0.3, 0.2), "upper only": (-math.inf, 0.1), "crossed": (0.5, -0.5),
}  # fmt: skip


@pytest.mark.parametrize("adds", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_residuals_and_bounds(bounds, adds):
    low, high = BOUNDS[bounds]
    layer = conv(4, 6, 3, padding=1, low=low, high=high)
    x, residual = torch.randn(3, 4, 7, 5), torch.randn(3, 6, 7, 5)
    inputs = (x, residual) if adds else (x,)
    assert error(run_layer(layer, *inputs), reference(layer, *inputs)) < TOLERANCE
    assert error(layer(*inputs), reference(layer, *inputs)) < TOLERANCE


def test_the_residual_may_be_the_input():
    layer = conv(4, 4, 3, padding=1)
    x = torch.randn(2, 4, 7, 5)
    assert error(run_layer(layer, x, x), reference(layer, x, x)) < TOLERANCE


@pytest.mark.parametrize("adds", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("leading", [(), (1,), (5,), (3, 4), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_linear_layers(batch, leading, adds):
    layer = Layer("weight", sparse_weight(torch.Size((11, 19))), torch.randn(11), low=0.0)
    x, residual = torch.randn(batch, *leading, 19), torch.randn(batch, *leading, 11)
    inputs = (x, residual) if adds else (x,)
    assert error(run_layer(layer, *inputs), reference(layer, *inputs)) < TOLERANCE


def test_output_channels_without_weights():
    layer = conv(4, 6, 3, padding=1)
    layer.weight[[0, 3, 5]] = 0
    x = torch.randn(2, 4, 7, 5)
    for threads in (1, 2, 3):
        assert error(run_layer(layer, x, threads=threads), reference(layer, x)) < TOLERANCE


POOLS = {  # kernel, stride, padding, dilation
    "2x2": ((2, 2), (2, 2), (0, 0), (1, 1)),
    "3x3 stride 2 padded": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "stride 1 padded": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "mixed": ((3, 2), (1, 2), (1, 0), (1, 1)),
    "dilated": ((3, 3), (2, 1), (1, 1), (2, 3)),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pool", POOLS)
def test_max_pooling_of_negative_pixels(pool, batch):
    layer = MaxPool.create("pool", 5, *POOLS[pool])
    x = -1 - torch.rand(batch, 5, 11, 9)
    x[0, 0, 0, 0], x[0, 1, 3, 3] = torch.inf, -torch.inf
    expected = F.max_pool2d(x, *POOLS[pool])
    assert torch.equal(run_any_values(layer, x), expected)
    assert torch.equal(layer(x), expected)


def run_any_values(layer, x):
    """Like `run_layer`, for values that may be NaN or infinite."""
    plan = Plan.build(graph_of(layer, x), [layer])
    workspace = workspace_of_nan(plan, len(x), {layer.name: TILE})
    workspace(torch.full_like(x, torch.nan))  # must not affect the next call
    return workspace(x)


LAYERS = {
    "conv": lambda: conv(3, 4, 3, padding=1, sparsity=0.0, low=0.0, high=6.0),
    "strided": lambda: conv(3, 4, 3, padding=1, stride=2, sparsity=0.0),
    "pool": lambda: MaxPool.create("pool", 3, (3, 3), (2, 2), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_values_that_are_not_finite(name, number):
    """They affect the same pixels, images and channels as in PyTorch."""
    layer, x = LAYERS[name](), torch.randn(3, 3, 9, 7)
    for position in ((0, 0, 0, 0), (1, 2, 4, 3), (2, 1, 8, 6)):
        marked = x.clone()
        marked[position] = number
        expected = reference(layer, marked).float()
        torch.testing.assert_close(run_any_values(layer, marked), expected, equal_nan=True)
    assert error(run_any_values(layer, x), reference(layer, x)) < TOLERANCE


def test_a_weight_of_0_does_not_propagate_nan():
    """Unlike in PyTorch, where 0 x NaN is NaN: zero weights are skipped."""
    layer = conv(1, 1, 3, padding=1, sparsity=1.0)
    layer.weight[0, 0, 1, 1] = 1.0
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = torch.nan
    assert run_any_values(layer, x).isnan().sum() == 1


def test_denormal_numbers():
    layer = conv(1, 1, 1, sparsity=0.0)
    layer.weight.fill_(1.0)
    layer.bias.zero_()
    x = torch.full((1, 1, 3, 3), 1e-40)
    assert torch.equal(run_layer(layer, x), x)


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "column stride 2": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "column stride 3": lambda x: x.repeat_interleave(3, 3)[..., ::3],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "slice": lambda x: F.pad(x, (2, 3, 1, 1))[..., 1:-1, 2:-3],
    "expanded": lambda x: x[..., :1, :1].expand_as(x),
    "negated": lambda x: torch._neg_view(x),
}


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_input(layout, stride):
    layer = conv(21, 4, 3, padding=1, stride=stride)
    x = LAYOUTS[layout](torch.randn(2, 21, 19, 18))
    assert error(run_layer(layer, x), reference(layer, x)) < TOLERANCE


@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "own threads"])
def test_threads_give_the_same_bits(openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(kernels.library(), "run_team", None)
    layer = conv(6, 9, 3, padding=1, low=0.0)
    x, residual = torch.randn(3, 6, 13, 11), torch.randn(3, 9, 13, 11)
    one, *others = (run_layer(layer, x, residual, threads=n) for n in (1, 2, 3, 16))
    assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tile", [Tile(1, 8, 1), Tile(3, 8, 2), Tile(8, 8, 1)], ids=str)
def test_padding_below_images_is_0_without_being_computed(batch, tile):
    """A 5x5 layer reads two rows of zeros below the image, which the layer before it wrote."""
    x = torch.randn(batch, 4, 7, 7)
    first, second = conv(4, 4, 1, name="first"), conv(4, 2, 5, name="second", padding=2)
    graph = Graph()
    given = graph.placeholder("x")
    given.meta["val"] = x
    node = graph.call_function(first, (given,))
    node.meta["val"] = first(x)
    result = graph.call_function(second, (node,))
    result.meta["val"] = second(first(x))
    graph.output(result)
    plan = Plan.build(graph, [first, second])
    planes = next(s.out for s in plan.steps if isinstance(s, Sparse))
    assert planes.pixels(batch) < planes.channel_stride(batch)
    workspace = workspace_of_nan(plan, batch, {"first": tile, "second": tile})
    assert error(workspace(x), second(first(x))) < TOLERANCE
