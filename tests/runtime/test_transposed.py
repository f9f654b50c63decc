"""Transposed convolutions run sparse, as convolutions whose results are interleaved."""

import random

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import DENSE, SPARSE, check, compiled, pruned, sparse_layers
from torch import nn

from torch_feather.runtime import kernels
from torch_feather.runtime.plan import Operation
from torch_feather.runtime.transposed import TransposedConvolution

FORMS = {  # in, out, kernel, height, width, options
    "2x2 stride 2": (5, 7, 2, 6, 5, {"stride": 2}),
    "4x4 stride 2": (5, 7, 4, 6, 5, {"stride": 2, "padding": 1}),
    "3x3 stride 2, padded": (4, 6, 3, 5, 7, {"stride": 2, "padding": 1, "output_padding": 1}),
    "3x3 stride 2, odd": (4, 6, 3, 5, 7, {"stride": 2, "padding": 1}),
    "stride 1": (4, 6, 3, 9, 7, {}),
    "stride 1, padded widely": (4, 6, 3, 9, 7, {"padding": 4}),
    "stride 1, dilated": (4, 6, 3, 9, 7, {"padding": 1, "dilation": 2, "output_padding": 1}),
    "strides mixed": (3, 5, (3, 4), 5, 4, {"stride": (2, 3), "padding": (0, 2)}),
    "strides 1 and 4": (3, 5, (3, 5), 5, 4, {"stride": (1, 4), "output_padding": (0, 3)}),
    "strides 3 and 1": (3, 5, 3, 5, 4, {"stride": (3, 1), "padding": (1, 1)}),
    "stride beyond kernel": (3, 5, 2, 5, 4, {"stride": 3, "output_padding": 1}),
    "dilated": (3, 5, 3, 5, 6, {"stride": 2, "dilation": (2, 3), "padding": (1, 4)}),
    "groups": (6, 9, 3, 7, 6, {"stride": 2, "padding": 1, "groups": 3}),
    "groups, stride 1": (6, 9, 3, 7, 6, {"padding": 1, "groups": 3}),
    "depthwise": (5, 5, 4, 7, 6, {"stride": 2, "padding": 1, "groups": 5, "bias": False}),
    "one pixel": (3, 4, 4, 1, 1, {"stride": 2, "padding": 1}),
    "33 x 17": (3, 4, 4, 33, 17, {"stride": 2, "padding": 1}),
    "cropped by its padding": (3, 4, 3, 5, 5, {"stride": 2, "padding": 3}),
}


@pytest.mark.parametrize("form", FORMS)
def test_convolutions(form):
    channels, out, kernel, height, width, options = FORMS[form]
    model = pruned(nn.Sequential(nn.ConvTranspose2d(channels, out, kernel, **options)))
    network = check(model, (channels, height, width))
    assert sparse_layers(network) == ["0.weight"]
    check(model, (channels, height, width), tuning=DENSE)


@pytest.mark.parametrize("seed", range(20))
def test_random_sequences(seed):
    rng = random.Random(seed)
    stride, dilation = rng.choice([1, 2, 3, 4]), rng.choice([1, 1, 2])
    groups, kernel = rng.choice([1, 1, 2]), rng.randrange(1, 7)
    options = {
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "padding": rng.randrange(dilation * (kernel - 1) + 1),
        "output_padding": rng.randrange(max(stride, dilation)),
    }
    channels, out = groups * rng.randrange(1, 5), groups * rng.randrange(1, 5)
    sparsity = rng.choice([0.0, 0.5, 0.9])
    layer = nn.ConvTranspose1d(channels, out, kernel, **options)
    model = pruned(nn.Sequential(nn.Conv1d(channels, channels, 1), layer, nn.ReLU()), sparsity)
    network = check(model, (channels, rng.randrange(4, 30)), batches=(rng.choice([2, 3]), 1))
    assert sparse_layers(network) == ["0.weight", "1.weight"]


def test_output_channels_without_weights():
    model = pruned(nn.Sequential(nn.ConvTranspose2d(4, 6, 4, 2, 1)))
    model[0].weight.data[:, [0, 3, 5]] = 0
    check(model, (4, 5, 6))
    model[0].weight.data.zero_()
    check(model, (4, 5, 6))


def test_a_stride_without_a_kernel_is_left_to_pytorch():
    network = compiled(
        pruned(nn.Sequential(nn.ConvTranspose2d(3, 4, 5, 5))), torch.randn(2, 3, 4, 4)
    )
    assert not network.tuning
    assert "conv_transpose2d" in repr(network)


class UNet(nn.Module):
    """Skips by concatenation, batch norm and activations after transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1)
        self.c = nn.Conv2d(12, 16, 3, 2, 1)
        self.up = nn.ConvTranspose2d(16, 12, 4, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.mix, self.last = nn.Conv2d(24, 12, 3, padding=1), nn.ConvTranspose2d(12, 8, 2, 2)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        a = self.a(x).relu()
        b = self.b(a).relu()
        c = F.silu(self.norm(self.up(self.c(b).relu())))
        d = self.mix(torch.cat([c, b], 1)).relu()
        return self.out(torch.cat([self.last(d).clamp(-1, 1), a], 1)) + self.last(b)[:, :2]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_network(threads):
    model = pruned(UNet())
    network = check(model, (3, 12, 20), threads=threads)
    assert len(sparse_layers(network)) == 8
    names = [s.name for s in network.plan.steps if isinstance(s, Operation)]
    assert names.count("interleave") == 3
    check(model, (3, 12, 20), tuning=DENSE)


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle(factor):
    layers = nn.Conv2d(3, 4 * factor**2, 3, padding=1), nn.PixelShuffle(factor), nn.Conv2d(4, 2, 3)
    network = check(pruned(nn.Sequential(*layers)), (3, 7, 5))
    assert "pixel_shuffle" not in repr(network)


def test_timed_layers():
    """A network is tuned, and the results apply to it again."""
    model = pruned(nn.Sequential(nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU()), 0.9)
    network = compiled(model, torch.randn(1, 8, 9, 9), tuning=None)
    assert network.tuning["0.weight"].sparse_ms > 0


def test_the_nonzero_weights_are_the_same():
    layer = TransposedConvolution(
        "w", torch.arange(48.0).reshape(2, 3, 2, 4), torch.zeros(2), (2, 3), output_padding=(1, 0)
    )
    form = layer.kernel_form
    assert form.channels == (3, 12)
    assert sorted(form.taps.values) == list(range(1, 48))
    assert form is layer.kernel_form


@pytest.mark.parametrize("tile", kernels.tiles(kernels.host().widths)[::3], ids=str)
def test_tiles(tile):
    from dataclasses import replace

    model = pruned(nn.Sequential(nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.Conv2d(4, 4, 3)))
    check(model, (4, 9, 11), tuning=replace(SPARSE, tile=tile))
