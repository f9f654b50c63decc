"""Interpolation, adaptive pooling and softmax over channels stay in planes."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import check as check_sizes
from runtime_cases import compiled, pruned
from test_planes import Net, check, conv, identity, in_pytorch
from torch import nn

from torch_feather.runtime.resampling import matrices
from torch_feather.runtime.steps import Operation

SIZES = [(9, 7), (1, 1), (16, 33), (5, 1), (1, 40)]
RESIZED = {
    "twice": partial(F.interpolate, scale_factor=2, mode="bilinear"),
    "eight times": partial(F.interpolate, scale_factor=(8, 3), mode="bilinear", align_corners=True),
    "factors": partial(F.interpolate, scale_factor=(1.7, 2.3), mode="bilinear"),
    "recomputed factors": partial(
        F.interpolate, scale_factor=(1.7, 2.3), mode="bilinear", recompute_scale_factor=True
    ),
    "size": partial(F.interpolate, size=(21, 5), mode="bilinear"),
    "corners": partial(F.interpolate, size=(4, 19), mode="bilinear", align_corners=True),
    "one pixel": partial(F.interpolate, size=1, mode="bilinear"),
    "one row": partial(F.interpolate, size=(1, 18), mode="bilinear", align_corners=True),
    "the same size": lambda y: F.interpolate(y, size=y.shape[2:], mode="bilinear"),
    "of means": lambda y: F.interpolate(F.adaptive_avg_pool2d(y, 1), size=(9, 7), mode="bilinear"),
    "antialiasing": partial(F.interpolate, size=(4, 15), mode="bilinear", antialias=True),
    "bicubic": partial(F.interpolate, size=(13, 5), mode="bicubic"),
    "bicubic factor": partial(F.interpolate, scale_factor=2, mode="bicubic", align_corners=True),
    "bicubic antialiasing": partial(F.interpolate, size=(13, 4), mode="bicubic", antialias=True),
    "nearest": partial(F.interpolate, size=(13, 5)),
    "nearest factor": partial(F.interpolate, scale_factor=2.3),
    "nearest exact": partial(F.interpolate, size=(13, 5), mode="nearest-exact"),
    "average": partial(F.adaptive_avg_pool2d, output_size=(4, 3)),
    "average of columns": partial(F.adaptive_avg_pool2d, output_size=(None, 2)),
    "more average": partial(F.adaptive_avg_pool2d, output_size=(17, 10)),
    "maximum": partial(F.adaptive_max_pool2d, output_size=(4, 3)),
    "one maximum": partial(F.adaptive_max_pool2d, output_size=1),
    "more maxima": partial(F.adaptive_max_pool2d, output_size=(17, 10)),
    "same maxima": lambda y: F.adaptive_max_pool2d(y, y.shape[2:]),
}


def around(function):
    """Apply a function between convolutions with and without padding, and to a result."""

    def net(x, a, b, c):
        y = function(a(x))
        return b(y) + c(y), function(c(x))

    return net


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", RESIZED)
def test_interpolation_and_adaptive_pooling_stay_in_planes(name, size):
    x = torch.randn(2, 8, *size)
    network = check(around(RESIZED[name]), conv(), conv(), conv(kernel=1), x=x)
    assert in_pytorch(network) == []


@pytest.mark.parametrize("name", RESIZED)
def test_several_threads_and_eight_samples(name):
    network = check(
        around(RESIZED[name]), conv(), conv(), conv(kernel=1), x=torch.randn(8, 8, 6, 11), threads=2
    )
    assert in_pytorch(network) == []


@pytest.mark.parametrize("name", ["twice", "corners", "bicubic", "average", "maximum"])
def test_files_hold_the_taps(name):
    """Compared in float64, too."""
    model = pruned(Net(around(RESIZED[name]), conv(), conv(), conv(kernel=1)))
    assert in_pytorch(check_sizes(model, (8, 9, 7))) == []


SEQUENCES = {
    "linear": partial(F.interpolate, size=17, mode="linear"),
    "linear factor": partial(F.interpolate, scale_factor=2.5, mode="linear"),
    "linear corners": partial(F.interpolate, scale_factor=2, mode="linear", align_corners=True),
    "nearest": partial(F.interpolate, size=5),
    "nearest exact": partial(F.interpolate, size=5, mode="nearest-exact"),
    "average": partial(F.adaptive_avg_pool1d, output_size=4),
    "maximum": partial(F.adaptive_max_pool1d, output_size=4),
    "softmax": partial(torch.softmax, dim=1),
    "log_softmax": partial(torch.log_softmax, dim=1),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_functions_of_sequences_stay_in_planes(name):
    parts = [nn.Conv1d(8, 8, 3, padding=1) for _ in range(2)]
    function = SEQUENCES[name]
    network = check(lambda x, a, b: b(function(a(x))), *parts, x=torch.randn(2, 8, 11))
    assert not [n for n in in_pytorch(network) if "squeeze" not in n]


def test_nearest_neighbors_are_copied_exactly():
    x = torch.randn(1, 1, 9, 7)
    for mode in ("nearest", "nearest-exact"):
        function = partial(F.interpolate, size=(13, 11), mode=mode)
        network = compiled(Net(lambda x, a, f=function: f(a(x)), identity()).eval(), x)
        assert torch.equal(network(x), function(x))
        assert in_pytorch(network) == []


def test_each_axis_that_changes_takes_one_step():
    for size, names in (((9, 14), ["columns"]), ((5, 7), ["rows"]), ((5, 14), ["rows", "columns"]),
                        ((18, 14), ["columns", "rows"]), ((9, 7), ["rows"])):  # fmt: skip
        net = partial(F.interpolate, size=size, mode="bilinear")
        network = compiled(Net(lambda x, a, f=net: f(a(x)), conv()), torch.randn(1, 8, 9, 7))
        found = [s.name for s in network.plan.steps if isinstance(s, Operation)]
        assert found == names


def test_only_windows_with_nan_are_nan():
    x = torch.randn(2, 1, 9, 7)
    x[0, 0, 2, 3], x[1, 0, 8, 6], x[1, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    for function in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
        network = compiled(Net(lambda x, a, f=function: f(a(x), (4, 3)), identity()).eval(), x)
        expected = function(x, (4, 3))
        assert expected.isnan().any()
        assert expected.isnan().sum() < 12
        torch.testing.assert_close(network(x), expected, equal_nan=True)
        assert in_pytorch(network) == []


def test_what_planes_cannot_express_is_left_to_pytorch():
    def net(x, a, b):
        y = a(x)
        largest, index = F.adaptive_max_pool2d(y, 3, return_indices=True)
        return b(largest), index, F.interpolate(x, size=(5, 6), mode="bilinear"), y.softmax(3)

    found = in_pytorch(check(net, conv(), conv()))
    assert {"adaptive_max_pool2d", "upsample_bilinear2d", "softmax"} <= {
        name.removesuffix("_default").removesuffix("_vec").removesuffix("_int") for name in found
    }
    x = torch.randn(2, 8, 9, 7)
    wide = Net(lambda x, a: a(x).softmax(1, dtype=torch.float64), conv()).eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(wide, x)(x), wide(x))


def test_a_function_that_is_not_separable_is_left_to_pytorch(monkeypatch):
    """Functions are compared with their matrices, in case another version computes otherwise."""
    bilinear = torch.ops.aten.upsample_bilinear2d.vec
    named = {"output_size": [4, 4], "align_corners": False, "scale_factors": None}
    assert matrices(bilinear, (3, 3), named) is not None
    monkeypatch.setattr(
        type(bilinear), "__call__", lambda self, x, **named: self._op(x, **named) ** 2
    )
    assert matrices(bilinear, (3, 3), named) is None


@pytest.mark.parametrize("channels", [1, 3, 8, 21])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_over_channels_stays_in_planes(name, channels):
    """Padding stays 0 although 1 / channels is not: the second convolution reads it."""
    function = getattr(torch, name)
    for kernel in (1, 3):
        network = check(
            lambda x, a, b: (b(function(a(x), 1)), function(a(x), -3)),
            *(conv(8, channels, kernel), conv(channels, 8, kernel)),
        )
        assert in_pytorch(network) == []


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_of_tokens_and_images_with_channels_last(name):
    function = getattr(torch, name)
    network = check(
        lambda x, a, b: b(function(a(x), -1)),
        *(nn.Linear(24, 40), nn.Linear(40, 8)),
        x=torch.randn(2, 9, 24),
    )
    assert in_pytorch(network) == []
    net = check(lambda x, a, b: b(function(a(x).permute(0, 2, 3, 1), -1)), conv(), nn.Linear(8, 3))
    assert in_pytorch(net) == []


def test_softmax_of_one_token_with_many_channels_is_left_to_pytorch():
    for channels, count in ((1000, 0), (1025, 1)):
        net = check(lambda x, a: a(x).softmax(-1), nn.Linear(24, channels), x=torch.randn(2, 24))
        assert len(in_pytorch(net)) == count


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_is_accurate_for_all_numbers(name):
    function = partial(getattr(torch, name), dim=1)
    x = torch.randn(4, 6, 9, 7) * torch.tensor([1e-3, 1.0, 30.0, 1e4]).view(4, 1, 1, 1)
    x[0, 0, 0, 0], x[1, 2, 3, 4], x[2, :, 5, 5] = -math.inf, math.nan, -math.inf
    x[2, 1, 6, 6], x[3, :, 1, 1] = math.inf, 2.5
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    factors = nn.Parameter(torch.ones(6, 1, 1))
    layer.factors = factors
    network = compiled(Net(lambda x, a: function(x * a.factors), layer).eval(), x)
    assert in_pytorch(network) == []
    expected = function(x.double()).float()
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=3e-7, equal_nan=True)


class Segmentation(nn.Module):
    """As DeepLab: dilated convolutions, the mean of the image, and pixels of a layer before."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        self.near, self.far = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=6, dilation=6)
        self.mean, self.parts = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.project, self.last = nn.Conv2d(40, 16, 3, padding=1), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        low = self.stem(x)
        y = self.body(low)
        resize = partial(F.interpolate, mode="bilinear", align_corners=False)
        mean = self.mean(F.adaptive_avg_pool2d(y, 1)).relu()
        parts = self.parts(F.adaptive_avg_pool2d(y, 6)).relu()
        wide = [resize(z, size=y.shape[2:]) for z in (mean, parts)]
        y = torch.cat([self.near(y), self.far(y).relu(), *wide], 1)
        y = resize(y, size=low.shape[2:])
        y = self.last(self.project(torch.cat([y, low], 1)).relu())
        return resize(y, size=x.shape[2:]).softmax(1)


def test_a_network_for_segmentation_runs_in_planes():
    network = check_sizes(pruned(Segmentation()), (3, 45, 62), batches=(2, 1, 8))
    assert "in PyTorch" not in repr(network)
    assert in_pytorch(network) == []
