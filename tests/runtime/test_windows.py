"""Tokens in another order: windows, cyclic shifts, and neighbors that become channels."""

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import check as check_sizes
from runtime_cases import compiled, error, pruned
from test_attention import in_pytorch
from torch import nn

from torch_feather.runtime.steps import Attention, Operation

C, SIZE, W = 16, 8, 4  # channels, pixels and window of a side


def check(model, shape, **options):
    """Compare a network with PyTorch, captured for one sample, for several, and for any number."""
    check_sizes(model, shape, batches=(2,), **options)
    return check_sizes(model, shape, batches=(1, 2, 3), **options)


def partition(x, w=W):
    b, height, width, c = x.shape
    x = x.view(b, height // w, w, width // w, w, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w * w, c)


def grid(x, w=W):
    """Windows of pixels that are far from each other, as in MaxViT."""
    b, height, width, c = x.shape
    x = x.view(b, w, height // w, w, width // w, c)
    return x.permute(0, 2, 4, 1, 3, 5).contiguous().view(-1, w * w, c)


def whole(x, size, w=W):
    n = size // w
    x = x.view(-1, n, n, w, w, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size, size, x.shape[-1])


class Attend(nn.Module):
    def __init__(self, channels=C):
        super().__init__()
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x):
        n, tokens, channels = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, tokens, channels))


class Block(nn.Module):
    """As in Swin: images with channels last."""

    def __init__(self, shift=0, split=partition):
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(C), Attend()
        self.shift, self.split = shift, split
        self.mlp = nn.Sequential(
            nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C)
        )

    def forward(self, x):
        size = x.shape[1]
        y = self.norm(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = whole(self.attend(self.split(F.pad(y, (0, 0, 0, 0, 0, 0)))), size)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.mlp(x.reshape(x.shape[0], -1, C)).reshape(x.shape)


class Merge(nn.Module):
    """Four neighbors become the channels of one pixel."""

    def __init__(self):
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        b, height, width, c = x.shape
        x = x.reshape(b, height // 2, 2, width // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduce(self.norm(x))


class Slices(nn.Module):
    """The same as in torchvision."""

    def __init__(self):
        super().__init__()
        self.merge = Merge()

    def forward(self, x):
        parts = x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]
        return self.merge.reduce(self.merge.norm(torch.cat(parts, -1)))


class Images(nn.Module):
    """A convolution before other layers, and one after them."""

    def __init__(self, *layers, kernel=4):
        super().__init__()
        self.before = nn.Conv2d(3, C, kernel, 4, (kernel - 4) // 2)
        self.norm, self.layers = nn.LayerNorm(C), nn.Sequential(*layers)
        self.after = nn.Conv2d(C, 8, 3, padding=1)

    def forward(self, x):
        y = self.norm(self.before(x).permute(0, 2, 3, 1))
        return self.after(self.layers(y).permute(0, 3, 1, 2))


def gathers(network):
    return [s for s in network.plan.steps if isinstance(s, Operation) and s.name == "gather"]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_windows(shift, threads):
    """One step brings pixels into the order of windows, also if they are shifted, and one back."""
    model = pruned(Images(Block(shift), Block(shift)), 0.5)
    network = check(model, (3, 4 * SIZE, 4 * SIZE), threads=threads)
    assert in_pytorch(network) <= {"aten.permute.default"}  # for the last convolution
    assert len(gathers(network)) == 4
    assert sum(isinstance(s, Attention) for s in network.plan.steps) == 2


def test_grids():
    network = check(pruned(Images(Block(split=grid)), 0.5), (3, 4 * SIZE, 4 * SIZE))
    assert gathers(network)


def test_one_window():
    """Windows of the whole image are in order already."""
    network = check(pruned(Images(Block()), 0.5), (3, 4 * W, 4 * W))
    assert not gathers(network)


def test_neighbors_as_channels():
    network = check(pruned(Images(Merge()), 0.5), (3, 4 * SIZE, 4 * SIZE))
    (step,) = gathers(network)
    assert step.index.shape == (4, SIZE * SIZE // 4)
    for batch in (1, 2):  # torch.export captures it for one size only
        model = pruned(Images(Slices()), 0.5)
        check_sizes(model, (3, 4 * SIZE, 4 * SIZE), batches=(batch,))


def test_stages():
    model = Images(Block(), Block(2), Merge(), Block(0), Block(1), Merge())
    network = check(pruned(model, 0.5), (3, 16 * W, 16 * W))
    assert in_pytorch(network) <= {"aten.permute.default"}


def test_images_with_padding():
    """A convolution of the same images needs padding; windows of them are copied."""

    class Both(Images):
        def forward(self, x):
            y = self.before(x)
            z = self.layers(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.after(y) + self.after(z)

    check(pruned(Both(Block(1), kernel=6), 0.5), (3, 4 * SIZE, 4 * SIZE))


def test_windows_that_do_not_fit():
    """Pixels that are padded are computed by PyTorch."""

    class Padded(Block):
        def forward(self, x):
            y = F.pad(x, (0, 0, 0, 2, 0, 2))
            return x + whole(self.attend(self.split(y)), y.shape[1])[:, :-2, :-2].contiguous()

    for batch in (1, 2):
        size = 4 * (SIZE - 2)
        check_sizes(pruned(Images(Padded()), 0.5), (3, size, size), batches=(batch,))


def test_orders_that_pytorch_reads():
    """Before and after a step brought them into order, and as results."""

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(C, C), nn.Linear(C, C)

        def forward(self, x):
            y = torch.roll(self.first(x), 3, 1)
            before = y.reshape(x.shape[0], -1).cumsum(1)
            z = self.second(y)
            heads = z.unflatten(1, (2, -1)).transpose(1, 2)
            return before, z, y, y.cumsum(1), heads.exp(), torch.roll(z, 1, 1)

    check(pruned(Read(), 0.5), (10, C))


def test_shifts_over_samples_and_channels():
    """Tokens of other samples, or other channels, are moved by PyTorch."""

    class Shift(nn.Module):
        def __init__(self, dims):
            super().__init__()
            self.first, self.second, self.dims = nn.Linear(C, C), nn.Linear(C, C), dims

        def forward(self, x):
            return self.second(torch.roll(self.first(x), [1] * len(self.dims), self.dims))

    for dims in ([0], [2], [0, 1], [1, 2]):
        network = check_sizes(pruned(Shift(dims), 0.5), (10, C), batches=(2, 3))
        assert not gathers(network)


def test_memory_before_it_is_written_does_not_matter():
    x = torch.randn(2, 3, 4 * SIZE, 4 * SIZE)
    network = compiled(pruned(Images(Block(1), Merge()), 0.5), x)
    expected = network(x)
    network._for_sizes(x).pool.free[0].memory.fill_(torch.nan)
    assert torch.equal(network(x), expected)


def test_swin_of_timm():
    timm = pytest.importorskip("timm")
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=56, window_size=7, embed_dim=32, depths=(2, 2), num_heads=(2, 4), num_classes=10
    )
    pruned(model, 0.9)
    network = compiled(model, torch.randn(1, 3, 56, 56))
    assert in_pytorch(network) == {"aten.mean.dim"}
    for batch in (1, 3):
        x = torch.randn(batch, 3, 56, 56)
        with torch.no_grad():
            assert error(network(x), model(x)) < 1e-5
