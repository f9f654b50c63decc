"""Inputs of other sizes than the example's: images, sequences, batches."""

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import DENSE, SPARSE, TOLERANCE, compiled, error, pruned
from torch import nn

from torch_feather.runtime import InputError, compile_sparse, other_sizes

EITHER = pytest.mark.parametrize("tuning", [SPARSE, DENSE], ids=["sparse", "dense"])


class Pixels(nn.Module):
    """Squeeze-excite, strides, pooling, a transposed convolution, interpolation, a sum."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.up, self.last = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        y = F.silu(self.norm(self.first(x)))
        factors = torch.sigmoid(self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()))
        y = self.depthwise(y) * factors
        y = y + F.interpolate(F.max_pool2d(y, 2, ceil_mode=True), y.shape[2:])
        return self.last(self.up(y))


class SamePadding(nn.Module):
    """As in TensorFlow: how the padding is divided depends on the size."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 5, 2)

    def forward(self, x):
        y = self.norm(self.first(padded(x, 3))).relu()
        return self.last(padded(y, 5))


def padded(x, kernel):
    before, after = [], []
    for n in reversed(x.shape[2:]):
        missing = max((-(-n // 2) - 1) * 2 + kernel - n, 0)
        before.append(missing // 2)
        after.append(missing - missing // 2)
    return F.pad(x, (before[0], after[0], before[1], after[1]))


class Classes(nn.Sequential):
    """Any image becomes 3×3 pixels before the linear layer."""

    def __init__(self):
        super().__init__(
            *(nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(3)),
            *(nn.Flatten(), nn.Linear(54, 7)),
        )


class Tokens(nn.Module):
    """A causal transformer whose positions and mask are parts of longer ones."""

    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(11, 16), nn.Parameter(torch.randn(24, 16))
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 11)
        self.register_buffer("mask", torch.ones(24, 24).tril().bool())

    def forward(self, ids):
        n = ids.shape[1]
        x = self.embedding(ids) + self.position[:n]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:n, :n])
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def images(*sizes):
    return [torch.randn(batch, 3, height, width) for batch, height, width in sizes]


def sequences(*sizes):
    return [torch.randint(11, size) for size in sizes]


CASES = {
    "pixels": (Pixels, images((1, 16, 12), (1, 20, 32), (3, 20, 32), (2, 16, 12), (1, 6, 8))),
    "same padding": (SamePadding, images((1, 16, 12), (1, 15, 13), (2, 9, 12), (1, 17, 11))),
    "classes": (Classes, images((2, 9, 7), (2, 12, 5), (1, 12, 5), (2, 3, 3))),
    "tokens": (Tokens, sequences((1, 9), (1, 24), (2, 24), (1, 1), (4, 9))),
    "recurrent": (
        Recurrent,
        [torch.randn(s) for s in ((1, 5, 6), (1, 9, 6), (3, 9, 6), (1, 1, 6))],
    ),
}


@EITHER
@pytest.mark.parametrize("name", CASES)
def test_other_sizes(name, tuning):
    """Each is computed as the model computes it, also after another one."""
    kind, given = CASES[name]
    model = pruned(kind())
    network = compiled(model, given[0], tuning)
    for x in (*given, *reversed(given)):
        assert error(network(x), model(x)) < TOLERANCE


def test_weights_are_shared_between_sizes():
    model = pruned(Pixels())
    first, other = images((1, 16, 12), (1, 20, 32))
    network = compiled(model, first)

    def layers(plan):
        return {s.layer for s in plan.steps if hasattr(s, "layer") and not s.layer.pools}

    found = layers(network.planned(other).plan)
    assert found == layers(network.plan)
    assert all(layer.is_released for layer in found if layer.kernel_form is layer)


def test_no_later_change_of_the_model_affects_another_size():
    model = pruned(Tokens())
    first, other = sequences((1, 9), (2, 17))
    expected = model(other)
    network = compiled(model, first)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    assert error(network(other), expected) < TOLERANCE


def test_several_inputs_of_other_sizes():
    class Two(nn.Linear):
        def forward(self, x, y):
            return super().forward(x).mean(1) + super().forward(y).amax(1)

    model = pruned(Two(6, 5))
    network = compiled(model, {"x": torch.randn(1, 4, 6), "y": torch.randn(1, 2, 6)})
    for sizes in ((4, 3), (7, 2), (4, 2)):
        x, y = (torch.randn(2, n, 6) for n in sizes)
        assert error(network(x=x, y=y), model(x, y)) < TOLERANCE


def test_sizes_that_the_model_rejects():
    """The error has the size and the model's reason, and the network remains usable."""

    class Strict(nn.Conv2d):
        def forward(self, x):
            assert x.shape[-1] % 4 == 0, "the width must be divisible by 4"
            return super().forward(x)

    model = pruned(Strict(3, 4, 3))
    first, wrong, right = images((1, 8, 8), (2, 8, 9), (2, 9, 12))
    network = compiled(model, first)
    for _ in range(2):
        with pytest.raises(InputError, match=r"\(2, 3, 8, 9\).*the width must be divisible"):
            network(wrong)
    assert error(network(right), model(right)) < TOLERANCE
    with pytest.raises(InputError, match=r"\(batch, 3, 8, 8\)"):
        network(right[0])
    with pytest.raises(InputError, match=r"\(batch, 3, 8, 8\)"):
        network(right[:0])


def test_other_weights_for_another_size():
    """The first capture has not seen them, so they may have changed since."""

    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.wide(x) if x.shape[-1] > 8 else self.narrow(x)

    narrow, wide = images((1, 8, 8), (1, 8, 9))
    network = compiled(pruned(Choosing()), narrow)
    with pytest.raises(InputError, match="uses other weights"):
        network(wide)


def test_a_graph_that_reads_memory_for_another_size_requires_contiguous_inputs():
    class Strided(nn.Conv2d):
        def forward(self, x):
            y = super().forward(x)
            if x.shape[-1] < 9:
                return y
            return y + x.as_strided((1, 1, 1, 1), (1, 1, 1, 1))

    model = pruned(Strided(3, 4, 1))
    first, other = images((1, 8, 8), (2, 8, 10))
    network = compiled(model, first)
    assert error(network(other), model(other)) < TOLERANCE
    with pytest.raises(InputError, match="calls as_strided"):
        network(other.to(memory_format=torch.channels_last))
    swapped = first.transpose(2, 3)
    assert error(network(swapped), model(swapped)) < TOLERANCE


def test_outputs_of_another_structure_and_other_strides():
    class Structured(nn.Conv2d):
        def forward(self, x):
            y = super().forward(x)
            return {"wide": y.permute(0, 2, 3, 1)} if x.shape[-1] > 8 else (y, y.flatten(1))

    model = pruned(Structured(3, 4, 1))
    first, wide = images((1, 8, 8), (2, 8, 10))
    network = compiled(model, first)
    assert network(wide)["wide"].stride() == model(wide)["wide"].stride()
    assert error(network(wide)["wide"], model(wide)["wide"]) < TOLERANCE
    y, flat = network(first)
    assert (y.shape, flat.shape) == ((1, 4, 8, 8), (1, 256))


def test_graphs_of_the_last_sizes_are_kept(monkeypatch):
    model, captured = pruned(Classes()), []
    network = compiled(model, torch.randn(1, 3, 8, 8))
    capture = other_sizes.capture

    def counted(model, example):
        captured.append(tuple(example.shape[2:]))
        return capture(model, example)

    monkeypatch.setattr(other_sizes, "capture", counted)
    monkeypatch.setattr(other_sizes, "MAX_GRAPHS", 2)
    for width in (5, 6, 5, 7, 5, 6):
        network._runs.clear()
        network(torch.randn(1, 3, 8, width))
    assert captured == [(8, 5), (8, 6), (8, 7), (8, 6)]


def test_tuned_networks_accept_other_sizes():
    model = pruned(Pixels())
    first, other = images((1, 16, 12), (2, 40, 36))
    network = compile_sparse(model, first, threads=1)
    assert error(network(other), model(other)) < TOLERANCE
