"""Operations of PyTorch in native libraries and in C99: both compute what PyTorch computes."""

import math
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from native_cases import TOLERANCE, compile_and_run, error, library, needs_gcc, pruned
from torch import nn

import torch_feather as feather
from torch_feather.native.export import prepare
from torch_feather.native.expressions import operand, total
from torch_feather.native.lowering import Builder, transform
from torch_feather.native.products import Product
from torch_feather.native.program import Buffer, Loops, Program, View
from torch_feather.runtime import LayerTuning
from torch_feather.runtime.kernels import Tile

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
pytestmark = needs_gcc
IMAGE, TOKENS = (2, 4, 9, 6), (2, 7, 16)


class Function(nn.Module):
    """A convolution, so that activations are in planes, then functions on its result."""

    def __init__(self, *functions):
        super().__init__()
        self.conv, self.functions = nn.Conv2d(4, 8, 3, padding=1), functions

    def forward(self, x):
        y = self.conv(x)
        return tuple(function(y) for function in self.functions)


class Attention(nn.Module):
    def __init__(self, mask=None, causal=False):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mask, self.causal = mask, causal

    def forward(self, x):
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(batch, tokens, 3, 4, 4).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Windows(nn.Module):
    """Shifted windows, as in Swin: the batch is not the first dimension of the linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1).roll((-1, 2), (1, 2))
        batch, height, width, channels = x.shape
        x = x.view(batch, height // 3, 3, width // 3, 3, channels).transpose(2, 3)
        return F.relu(self.linear(x.reshape(-1, 9, channels)))


class FirstSample(nn.Module):
    """A linear layer without planes: its tokens are no multiple of the samples of the batch."""

    def __init__(self, tokens=7):
        super().__init__()
        self.linear, self.tokens = nn.Linear(16, 9), tokens

    def forward(self, x):
        return self.linear(x[0, : self.tokens])


def squeeze_excite(y):
    return y * y.mean((2, 3), keepdim=True).sigmoid()


ACTIVATIONS = (
    *(F.relu, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, F.elu, F.mish),
    *(F.relu6, F.softplus, F.leaky_relu, F.selu, F.celu, partial(F.gelu, approximate="tanh")),
    *(torch.exp, torch.abs),
    *(lambda y: (y * y + 1).rsqrt(), lambda y: 1 - y / 3, lambda y: y.clamp(min=-0.2), torch.neg),
)
POOLINGS = (
    partial(F.max_pool2d, kernel_size=3, stride=2, padding=1),
    partial(F.max_pool2d, kernel_size=2, ceil_mode=True),
    partial(F.avg_pool2d, kernel_size=2),
    partial(F.avg_pool2d, kernel_size=3, stride=2, padding=1, ceil_mode=True),
    partial(F.avg_pool2d, kernel_size=3, padding=1, count_include_pad=False),
    partial(F.adaptive_avg_pool2d, output_size=1),
    partial(F.adaptive_avg_pool2d, output_size=(3, 2)),
    partial(F.adaptive_avg_pool2d, output_size=(4, 5)),
    lambda y: y.mean((2, 3)),
    lambda y: y.amax(1),
    lambda y: y.sum(),
    squeeze_excite,
)
INTERPOLATIONS = (
    *(
        partial(F.interpolate, scale_factor=f, mode="bilinear")
        for f in (2, 3.3, (0.6, 1), (0.4, 4))
    ),
    *(partial(F.interpolate, size=s, mode="bilinear", align_corners=True) for s in (17, (1, 23))),
    partial(F.interpolate, size=(90, 60), mode="bilinear"),  # more runs than loop nests
    partial(F.interpolate, size=(13, 17), mode="bicubic"),
    partial(F.interpolate, size=(4, 13), mode="bilinear", antialias=True),
    *(
        partial(F.interpolate, size=s, mode=m)
        for s in (7, (18, 6))
        for m in ("nearest", "nearest-exact")
    ),
    partial(F.interpolate, scale_factor=2.1),  # twice the size, but not each pixel twice
    *(partial(F.adaptive_max_pool2d, output_size=s) for s in (1, (4, 5), (9, 6))),
    lambda y: F.interpolate(F.adaptive_avg_pool2d(y, 1), size=(9, 6), mode="bilinear"),
)
MOVES = (
    lambda y: torch.cat([y[:, 2:], y[:, :3]], 1),
    lambda y: torch.stack([y, 2 * y], 2),
    lambda y: y.flatten(1),
    lambda y: y.permute(0, 2, 3, 1).reshape(2, 54, 8),
    lambda y: y.chunk(2, 1)[1],
    lambda y: F.pad(y, (1, 2, 0, 3), value=0.5),
    lambda y: F.pad(y, (-1, 2)),
    lambda y: F.pixel_shuffle(y, 2),
    lambda y: F.interpolate(y, scale_factor=2),
    lambda y: y.roll(2, 3),
    lambda y: y.softmax(1),
    lambda y: y.log_softmax(-1),
    lambda y: F.group_norm(y, 4),
    lambda y: y.transpose(2, 3) @ y,
)
# Rows and columns that fill tiles, that leave a part of a tile, and that are too few for one.
PRODUCTS = (
    lambda y: y.flatten(2).mT @ y.flatten(2),
    lambda y: y.flatten(2).mT[:, :3] @ y.flatten(2)[..., :17],
    lambda y: y.flatten(2).mT[:, :1] @ y.flatten(2)[..., :33],
    lambda y: y.flatten(2) @ y.flatten(2).mT,
    lambda y: y.flatten(2)[:, None, :5] @ y.flatten(2).mT[:, None],
    lambda y: y.flatten(2).mT[:, :2] @ y.flatten(2)[..., :3],
)
CASES = {
    "products": (Function(*PRODUCTS), IMAGE),
    "dense": (FirstSample(), TOKENS),
    "dense, few rows": (FirstSample(tokens=1), TOKENS),
    "tiles": (Attention(torch.rand(37, 37) > 0.3, False), (2, 37, 16)),
    "a query without keys": (Attention(torch.arange(7)[:, None] > torch.arange(7)), TOKENS),
    "activations": (Function(*ACTIVATIONS), IMAGE),
    "poolings": (Function(*POOLINGS), IMAGE),
    "moves": (Function(*MOVES), IMAGE),
    "attention": (Attention(), TOKENS),
    "masked": (Attention(torch.rand(7, 7) > 0.3, False), TOKENS),
    "causal": (Attention(causal=True), TOKENS),
    "windows": (Windows(), IMAGE),
    "strides": (
        nn.Sequential(
            nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, 1, 2, 2, groups=8),
            nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 6, 2, 2, bias=False),
        ),
        (2, 4, 17, 13),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_native_and_c_agree_with_pytorch(case, tmp_path):
    agree(*CASES[case], tmp_path)


def test_interpolation_and_adaptive_pooling(tmp_path):
    agree(Function(*INTERPOLATIONS), IMAGE, tmp_path)


def test_interpolation_and_pooling_of_sequences(tmp_path):
    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 8, 3, padding=1)

        def forward(self, x):
            y = self.conv(x)
            return (
                F.interpolate(y, scale_factor=2.5, mode="linear"),
                F.interpolate(y, size=5),
                F.adaptive_max_pool1d(y, 4),
            )

    agree(Sequences(), (2, 4, 11), tmp_path)


def agree(model, shape, tmp_path):
    """Compare a native library, and C source, with PyTorch."""
    model = pruned(model, 0.5)
    feather.export_native(model, torch.zeros(shape), tmp_path / "native")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(x)
    found = library(tmp_path / "native")(x.numpy())
    if isinstance(expected, torch.Tensor):
        expected, found = (expected,), (found,)
    errors = [error(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < TOLERANCE, errors

    feather.export_c(model, torch.zeros(shape), tmp_path / "c")
    outputs = run_c(tmp_path / "c", x, [tuple(y.shape) for y in expected])
    errors = [error(a, b) for a, b in zip(outputs, expected, strict=True)]
    assert max(errors) < TOLERANCE, errors


def run_c(folder, x, shapes):
    """Compile C source with a program that reads one input and writes all outputs."""
    names = [f"output_{i}" for i in range(len(shapes))]
    x.numpy().astype("<f4").tofile(folder / "x.bin")
    sizes = [f"MODEL_{name.upper()}_SIZE" for name in names]
    lines = [
        "#include <stdio.h>",
        '#include "model.h"',
        "static float workspace[MODEL_WORKSPACE + 1], x[MODEL_INPUT_0_SIZE];",
        *(f"static float {n}[{size}];" for n, size in zip(names, sizes, strict=True)),
        "int main(void) {",
        'FILE *file = fopen("x.bin", "rb"), *out = fopen("y.bin", "wb");',
        "if (fread(x, 4, MODEL_INPUT_0_SIZE, file) != MODEL_INPUT_0_SIZE) return 1;",
        f"model_run(workspace, x, {', '.join(names)});",
        *(f"fwrite({n}, 4, {size}, out);" for n, size in zip(names, sizes, strict=True)),
        "return fclose(out); }",
    ]
    (folder / "program.c").write_text("\n".join(lines) + "\n")
    strict = ["gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1"]
    compile_and_run(folder, strict, "program.c", "model.c")
    flat = torch.frombuffer(bytearray((folder / "y.bin").read_bytes()), dtype=torch.float32)
    return [
        part.view(shape)
        for part, shape in zip(
            flat.split([max(1, torch.Size(s).numel()) for s in shapes]), shapes, strict=True
        )
    ]


class Shared(nn.Module):
    """One weight at two sizes, an empty layer, and the input as an output."""

    def __init__(self):
        super().__init__()
        self.conv, self.empty = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 4).view(4, 1, 1))

    def forward(self, x):
        y = F.max_pool2d(self.conv(x), 2)
        return x, self.conv(y) * self.scale, self.empty(y), self.scale.flatten()


def test_shared_and_empty_layers_and_constant_outputs(tmp_path):
    model = pruned(Shared(), 0.5)
    nn.init.zeros_(model.empty.weight)
    feather.export_native(model, torch.zeros(IMAGE), tmp_path / "native")
    feather.export_c(model, torch.zeros(IMAGE), tmp_path / "c")
    x = torch.randn(IMAGE)
    with torch.no_grad():
        expected = model(x)
    outputs = run_c(tmp_path / "c", x, [tuple(y.shape) for y in expected])
    for found in (library(tmp_path / "native")(x.numpy()), outputs):
        assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < TOLERANCE


def test_positions_that_are_far_apart(tmp_path):
    """More than 255 positions without a weight, for each number of channels of a tile."""
    model = nn.Sequential(nn.Conv2d(300, 8, 3, padding=1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[torch.arange(8), torch.tensor([0, 28, 56, 57, 85, 200, 298, 299]), 2, 1] = 1
        model[0].weight[3, 299, 0, 0] = -2
    x = torch.randn(1, 300, 5, 5)
    with torch.no_grad():
        expected = model(x)
    for tile in (Tile(1, 8, 1), Tile(1, 8, 2), Tile(1, 8, 4)):
        tuning = {"0.weight": LayerTuning(True, tile, 0.9)}
        feather.export_native(model, x, tmp_path, "x86-64-v3", name=f"n{tile[2]}", tuning=tuning)
        if "avx2" in CPU:
            found = library(tmp_path, f"n{tile[2]}")(x.numpy())
            assert error(found, expected) < TOLERANCE


def test_nan_stays_nan(tmp_path):
    """Clamping and pooling propagate NaN, as in PyTorch."""
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)).eval()
    feather.export_native(model, torch.zeros(1, 1, 4, 4), tmp_path / "native")
    feather.export_c(model, torch.zeros(1, 1, 4, 4), tmp_path / "c")
    x = torch.randn(1, 1, 4, 4)
    x[0, 0, 1, 2] = torch.nan
    expected = model(x)
    assert expected.isnan().sum() == 1
    found = torch.from_numpy(library(tmp_path / "native")(x.numpy()))
    (in_c,) = run_c(tmp_path / "c", x, [(1, 1, 2, 2)])
    for result in (found, in_c):
        torch.testing.assert_close(result, expected, equal_nan=True)


class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)  # an export needs a weight

    def forward(self, x):
        return x.exp(), x.erf(), x.tanh(), F.silu(x), F.gelu(x), x.sigmoid(), x.softmax(1)


def test_functions_of_any_number_need_no_c_library(tmp_path):
    """Exponentials are part of the loops, which LLVM can vectorize only then."""
    x = torch.cat([torch.linspace(-87, 88.7, 4000), torch.linspace(-5, 5, 4000)])
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 100, -100, 0.0])
    x = torch.cat([x, special])[None]
    feather.export_native(Functions(), torch.zeros_like(x), tmp_path)
    *found, softmax = map(torch.from_numpy, library(tmp_path)(x.numpy()))
    *expected, _ = Functions()(x.double())
    for result, correct in zip(found, expected, strict=True):
        torch.testing.assert_close(result, correct.float(), rtol=1e-6, atol=3e-7, equal_nan=True)
    exp = expected[0].float()
    torch.testing.assert_close(found[0], exp, rtol=1e-6, atol=1e-37, equal_nan=True)
    assert softmax.isnan().all()
    symbols = subprocess.check_output(["nm", "-u", tmp_path / "model.o"], text=True)
    assert set(symbols.split()) - {"U"} <= {"malloc", "free", "memset", "memcpy"}


def test_a_batch_that_is_not_first_is_refused_for_convolutions(tmp_path):
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x.transpose(0, 1).repeat(1, 3, 1, 1)[:, :3])

    with pytest.raises(feather.FeatherError, match=r"conv.weight.*first dimension|do not support"):
        feather.export_c(Swapped(), torch.zeros(2, 3, 4, 4), tmp_path)


def test_no_heap(tmp_path):
    model = pruned(nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(36, 3)))
    feather.export_c(model, torch.zeros(1, 1, 5, 5), tmp_path)
    subprocess.run(["gcc", "-c", "-O1", "model.c"], cwd=tmp_path, check=True)
    symbols = subprocess.check_output(["nm", "-u", tmp_path / "model.o"], text=True)
    assert set(symbols.split()) - {"U"} <= {"erff", "memset", "memcpy"}


@pytest.mark.parametrize(
    ("shapes", "row"),
    [
        (((5, 1, 6), (1, 9, 6)), 0),  # (rows, columns, summed)
        (((2, 5, 1, 6), (2, 1, 9, 6)), 1),
        (((1, 6), (9, 6)), None),
    ],
)
def test_products_of_adjacent_columns_are_computed_in_tiles(shapes, row):
    """The second factor has adjacent columns if it is transposed in memory, and not otherwise."""
    builder = Builder(Program(1))
    a, b = (View.contiguous(Buffer("work", math.prod(shape)), shape) for shape in shapes)
    columns = View.contiguous(b.buffer, (*b.shape[:-2], b.shape[-1], b.shape[-2]))
    columns = transform(columns, lambda t: t.mT)
    for factor in (columns, b):
        builder.compute(total(operand(0) * operand(1)) * 0.5 + 1.0, a, factor, reduced=1)
    tiled, single = (Product.of(op.nest) for op in builder.program.operations)
    assert (tiled.row, tiled.columns) == (row, 1)
    assert single is None


@pytest.mark.parametrize(("model", "copies"), [(Attention(), 1), (FirstSample(), 0)])
def test_factors_are_transposed_only_for_tiles(model, copies):
    """A loop that sums one number, as in C source, reads adjacent numbers of the second factor."""
    strides, counts = {}, {}
    for tiles in (True, False):
        operations = prepare(model, torch.zeros(TOKENS), tiles)[0].operations
        nests = [op.nest for op in operations if isinstance(op, Loops)]
        products = [n for n in nests if total(operand(0) * operand(1)) in n.expression.walk()]
        strides[tiles] = products[-1].operands[1][-2:]  # of columns, and of the summed index
        counts[tiles] = len(nests)
    assert strides[True][0] == strides[False][1] == 1
    assert counts[True] - counts[False] == copies  # of the values


def test_a_factor_of_too_few_rows_for_a_tile_is_not_transposed():
    for tokens, strides in ((3, (16, 1)), (5, (1, 9))):  # of columns, and of the summed index
        program, *_ = prepare(FirstSample(tokens), torch.zeros(TOKENS))
        (nest,) = (op.nest for op in program.operations if op.nest.reduced)
        assert nest.operands[1][-2:] == strides
