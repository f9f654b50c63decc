"""One-dimensional convolutions run sparse, with what follows them."""

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import DENSE, check, compiled, pruned, sparse_layers
from torch import nn

from torch_feather.runtime.plan import Torch

FORMS = {  # in, out, kernel, length, options
    "1": (5, 7, 1, 6, {}),
    "3": (4, 6, 3, 9, {"padding": 1}),
    "3 valid": (4, 6, 3, 9, {}),
    "4 same": (4, 6, 4, 9, {"padding": "same"}),
    "4 same dilated": (4, 6, 4, 19, {"padding": "same", "dilation": 3}),
    "valid by name": (4, 6, 3, 9, {"padding": "valid"}),
    "stride 2": (4, 6, 3, 10, {"padding": 1, "stride": 2}),
    "stride 5 of 7": (3, 4, 7, 31, {"padding": 3, "stride": 5}),
    "dilated": (4, 6, 3, 33, {"padding": 8, "dilation": 8}),
    "groups": (6, 9, 3, 17, {"padding": 1, "groups": 3, "bias": False}),
    "depthwise, stride 3": (5, 5, 3, 17, {"groups": 5, "stride": 3}),
    "of all": (3, 4, 8, 8, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_convolutions(form):
    channels, out, kernel, length, options = FORMS[form]
    model = pruned(nn.Sequential(nn.Conv1d(channels, out, kernel, **options)))
    network = check(model, (channels, length))
    assert sparse_layers(network) == ["0.weight"]
    assert network.tuning["0.weight"].sparse


def test_output_channels_without_weights():
    model = pruned(nn.Sequential(nn.Conv1d(4, 6, 3, padding=1)))
    model[0].weight.data[[0, 3, 5]] = 0
    check(model, (4, 9))
    model[0].weight.data.zero_()
    check(model, (4, 9))


class Causal(nn.Module):
    """Pads the past, in both usual ways: before a convolution, and by cutting off its end."""

    def __init__(self, dilation=2, stride=1):
        super().__init__()
        self.size = 2 * dilation
        options = {"dilation": dilation, "stride": stride}
        self.padded = nn.Conv1d(4, 6, 3, **options)
        self.cut = nn.Conv1d(6, 5, 3, padding=self.size, **options)
        self.rest = -(-self.size // stride)

    def forward(self, x):
        x = self.padded(F.pad(x, (self.size, 0))).relu()
        return self.cut(x)[..., : -self.rest]


@pytest.mark.parametrize(("dilation", "stride"), [(1, 1), (4, 1), (2, 2), (1, 3)])
def test_causal_padding_needs_no_function_of_pytorch(dilation, stride):
    network = check(pruned(Causal(dilation, stride)), (4, 23))
    assert sparse_layers(network) == ["padded.weight", "cut.weight"]
    called = [str(s.node.target) for s in network.plan.steps if isinstance(s, Torch)]
    assert all("pad" not in name and "slice" not in name for name in called)


def test_causal_padding_of_dense_layers():
    check(pruned(Causal()), (4, 23), tuning=DENSE)


class Sides(nn.Module):
    """Cuts and pads the sides of images, in ways that one padding of a layer can express or not."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=p) for p in (0, 1, 2, 1, 1))
        self.strided = nn.Conv2d(4, 4, 3, 2)

    def forward(self, x):
        a, b, c, d, e = self.layers
        x = a(F.pad(x, (1, 2, 0, 3)))  # left, right, top, bottom
        x = b(x)[:, :, 1:, 2:-1]
        x = c(F.pad(x, (0, 1), value=0.5))  # not with zeros
        padded = F.pad(x, (1, 0, 0, 1))
        x = d(padded) + e(padded[:, :, ::2, ::2]).mean((2, 3), keepdim=True)
        return self.strided(F.pad(x, (0, 1, 0, 1)))[..., :2], padded


def test_padding_of_images():
    network = check(pruned(Sides()), (4, 11, 12))
    assert len(sparse_layers(network)) == 6


class Residual(nn.Module):
    """A block of a network such as WaveNet: dilated convolutions, gates, and a sum of skips."""

    def __init__(self, channels=6):
        super().__init__()
        self.first = nn.Conv1d(2, channels, 1)
        self.dilated = nn.ModuleList(
            nn.Conv1d(channels, 2 * channels, 2, dilation=2**i) for i in range(3)
        )
        self.mixing = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(3))
        self.last = nn.Conv1d(channels, 3, 1)

    def forward(self, x):
        x = total = self.first(x)
        for i, (dilated, mixing) in enumerate(zip(self.dilated, self.mixing, strict=True)):
            a, b = dilated(F.pad(x, (2**i, 0))).chunk(2, dim=1)
            y = mixing(a.tanh() * b.sigmoid())
            x, total = x + y, total + y
        return self.last(total.relu())


class Pyramid(nn.Module):
    """Strided blocks with batch norm, pooling, concatenation and a factor for each channel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 8, 7, 2, 3), nn.BatchNorm1d(8), nn.ReLU())
        self.pool, self.mean = nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(2)
        self.norm, self.conv = nn.BatchNorm1d(8), nn.Conv1d(8, 8, 3, padding=1, bias=False)
        self.short = nn.Conv1d(16, 8, 1, 2)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Conv1d(8, 8, 1), nn.Sigmoid())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.pool(self.stem(x))
        y = F.gelu(self.norm(self.conv(x)))
        z = self.short(torch.cat([x, y], 1)) + self.mean(F.hardswish(x))[:, :, :]
        z = z * self.squeeze(z)
        return self.head(z.mean(-1)), z[:, 2:5], z.flatten(1), x.transpose(1, 2), y.softmax(2)


@pytest.mark.parametrize("threads", [1, 2])
def test_networks(threads):
    network = check(pruned(Residual()), (2, 41), threads=threads)
    assert len(sparse_layers(network)) == 8
    network = check(pruned(Pyramid()), (3, 56), threads=threads)
    assert {"short.weight", "squeeze.1.weight", "head.weight"} <= set(sparse_layers(network))
    for model, shape in ((Residual(), (2, 41)), (Pyramid(), (3, 56))):
        check(pruned(model), shape, tuning=DENSE, threads=threads)


def test_functions_between_convolutions_stay_in_planes():
    network = compiled(pruned(Residual()), torch.randn(2, 2, 41))
    called = {str(s.node.target) for s in network.plan.steps if isinstance(s, Torch)}
    assert called <= {"aten.unsqueeze.default", "aten.squeeze.dim"}


class Odd(nn.Module):
    """Functions that have no form for images, statistics, and weights that are not constant."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3)
        self.gate, self.norm = nn.GroupNorm(2, 8), nn.LayerNorm(8)
        self.register_buffer("curve", torch.linspace(0, 1, 10))
        self.register_buffer("scale", torch.rand(8, 1))

    def forward(self, x):
        y = self.conv(x)
        y = self.scale * (y + self.curve) * torch.rand_like(y).mul(0)[:, :1] + y
        y = F.pad(y, (1, 1), mode="reflect")
        z = self.other(F.pad(self.gate(y), (0, 0, 0, 0)))
        own = F.conv1d(x, x.mean(0, keepdim=True)[:, :, :3])
        return self.norm(z.transpose(1, 2)), own, y.amax(2), z.max(dim=2), z[1:], z.cumsum(2)


def test_functions_without_a_form_for_images():
    model = pruned(Odd())
    x = torch.randn(3, 4, 12)
    network = compiled(model, x)
    for found, expected in zip(
        torch.utils._pytree.tree_leaves(network(x)),
        torch.utils._pytree.tree_leaves(model(x)), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert set(sparse_layers(network)) == {"conv.weight", "other.weight"}
