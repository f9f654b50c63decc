"""Kernels for other processors: those that this one can execute too, and object files."""

import functools
import platform
import struct

import pytest
import torch
import torch.nn.functional as F
from runtime_cases import TOLERANCE, compiled, conv, error, pruned, run_layer
from test_planes import Net
from torch import nn

from torch_feather.runtime import kernels
from torch_feather.runtime.kernels import Target, Tile, Variant
from torch_feather.runtime.layer import MaxPool

HOST = kernels.host()
X86 = platform.machine().lower() in ("x86_64", "amd64")
FUSED, SEPARATE = "with a fused multiply-add", "without a fused multiply-add"
X86_TARGETS = {  # (cpu, features, widths, whether there is a fused multiply-add)
    "x86-64": ("x86-64", "", (4,), False),
    "x86-64-v2": ("x86-64-v2", "", (4,), False),
    "avx2": ("x86-64-v2", "+avx2", (8,), False),
    "x86-64-v3": ("x86-64-v3", "", (8,), True),
    "avx512": ("x86-64-v4", "", (16, 8), True),
}
TARGETS = {"host": (HOST, None)} | {
    name: (Target(HOST.triple, cpu, features, widths), fused)
    for name, (cpu, features, widths, fused) in X86_TARGETS.items()
    if X86 and widths[0] <= HOST.widths[0] and (not fused or "+fma" in HOST.features)
}


@functools.cache
def library_of(name):
    return kernels.KernelLibrary(TARGETS[name][0])


@pytest.fixture(params=TARGETS)
def target(request, monkeypatch):
    """Use the kernels of another processor."""
    monkeypatch.setattr(kernels.build, "_library", lambda: library_of(request.param))
    return TARGETS[request.param][0]


def test_convolutions(target):
    for tile in kernels.tiles(target.widths):
        layer = conv(3, 8, 3, padding=1, low=0.0, high=0.7)
        x, residual = torch.randn(2, 3, 11, 7), torch.randn(2, 8, 11, 7)
        expected = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
        for given, exact in (((x,), expected), ((x, residual), expected + residual)):
            result = run_layer(layer, *given, tile=tile)
            assert error(result, exact.clamp(0, 0.7)) < TOLERANCE, tile


def test_pooling_and_strides(target):
    x = torch.randn(3, 4, 9, 7) - 5
    x[0, 0, 2, 3] = torch.nan
    pool = MaxPool.create("pool", 4, (3, 3), (2, 2), (1, 1), (1, 1))
    for tile in kernels.tiles(target.widths):
        if tile.channels == 1:
            result = run_layer(pool, x[1:], tile=tile)
            assert torch.equal(result, F.max_pool2d(x[1:], 3, 2, 1))
    of_nan = compiled(nn.MaxPool2d(3, 2, 1), x)(x)
    assert torch.equal(of_nan.isnan(), F.max_pool2d(x, 3, 2, 1).isnan())


@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "own threads"])
def test_networks_on_several_threads(target, openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(kernels.library(), "run_team", None)
    model = pruned(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, 2)))
    x = torch.randn(3, 3, 12, 9).to(memory_format=torch.channels_last)
    network = compiled(model, x, threads=2)
    with torch.no_grad():
        for _ in range(5):
            assert error(network(x), model(x)) < TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
def test_attention(target, causal):
    """Several blocks of queries and of keys; the number of channels is no multiple of a tile."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(20, 60), nn.Linear(20, 20)

        def forward(self, x, mask):
            q, k, v = (y.unflatten(-1, (2, 10)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, None if causal else mask, is_causal=causal)
            return self.out(y.transpose(1, 2).flatten(2))

    model = pruned(Attention(), 0.5)
    for tokens in (7, 150):
        x, mask = torch.randn(2, tokens, 20), torch.randn(2, 1, tokens, tokens)
        mask[:, :, 5] = -torch.inf
        network = compiled(model, (x, mask), threads=2)
        assert not any("attention" in step for step in repr(network).split("in PyTorch")[1:])
        with torch.no_grad():
            assert error(network(x, mask), model(x, mask)) < 3 * TOLERANCE


def test_resampling_and_softmax(target):
    """Rows of fewer and of more pixels than a vector has, and not of a multiple of them."""

    def net(x, layer):
        y = layer(x)
        up = F.interpolate(y, scale_factor=(2, 2.6), mode="bilinear")
        pools = F.adaptive_avg_pool2d(y, (4, 5)), F.adaptive_max_pool2d(y, (4, 5))
        return (
            up,
            F.interpolate(y, size=(3, 11), mode="bicubic"),
            *pools,
            y.softmax(1).relu(),
            (y.log_softmax(1)),
        )

    for size in ((9, 7), (17, 35)):
        x, model = torch.randn(3, 5, *size), pruned(Net(net, nn.Conv2d(5, 6, 3, padding=1)), 0.5)
        network = compiled(model, x, threads=2)
        assert "in PyTorch" not in repr(network)
        with torch.no_grad():
            for found, expected in zip(network(x), model(x), strict=True):
                assert error(found, expected) < 3 * TOLERANCE


def assembly(target):
    """Return the text of some kernels."""
    some = [Variant(Tile(4, width, 1), "fma", False, True) for width in target.widths]
    machine = target.machine()
    text = kernels.emit_module(target, some)
    return machine.emit_assembly(kernels.build._optimized(text, machine))


@pytest.mark.parametrize("name", TARGETS)
def test_multiply_adds_are_fused_where_the_processor_can(name):
    """A call of `fmaf` for each number would be many times slower than a product and a sum."""
    target, fused = TARGETS[name]
    text = assembly(target)
    assert "fmaf" not in text
    if fused is not None:
        assert ("vfmadd" in text) == fused


EMITTED = {  # (target, how an object file begins, instruction of a fused multiply-add)
    "aarch64": (Target("aarch64-linux-gnu"), 183, "fmla"),
    "arm64 of Apple": (Target("arm64-apple-macosx"), b"\xcf\xfa\xed\xfe", "fmla"),
    "riscv64": (Target("riscv64-linux-gnu", features="+m,+a,+d"), 243, "fmadd.s"),
    "riscv64 with vectors": (Target("riscv64-linux-gnu", features="+m,+a,+v"), 243, "vfmacc"),
    "wasm32": (Target("wasm32-unknown-unknown"), b"\0asm", None),
    "wasm32 with vectors": (
        Target("wasm32-unknown-unknown", features="+simd128"), b"\0asm", None,
    ),
    "Windows": (Target("x86_64-pc-windows-msvc", features="+fma"), b"\x64\x86", "vfmadd"),
}  # fmt: skip


@pytest.mark.parametrize("name", EMITTED)
def test_object_files_of_other_processors(name):
    target, begin, fused = EMITTED[name]
    assert " asm " not in kernels.emit_module(target)  # LLVM would end the process
    found = kernels.emit_object(target)
    if isinstance(begin, int):  # ELF names the architecture
        assert found[:4] == b"\x7fELF"
        (begin_found,) = struct.unpack_from("<H", found, 18)
        assert begin_found == begin
    else:
        assert found.startswith(begin)
    for variant in kernels.build.variants(target):
        assert variant.name.encode() in found
    assert b"fmaf" not in found
    assert (b"usleep" in found) == ("windows" not in target.triple)
    text = assembly(target)
    assert fused is None or fused in text


@pytest.mark.parametrize("name", EMITTED)
def test_recurrent_kernels_of_other_processors(name):
    target, names = EMITTED[name][0], kernels.recurrence.recurrence_names()
    found = kernels.compile_object(target, kernels.emit_convolutions(target, (), names))
    assert all(kernel.encode() in found for kernel in names)


def test_an_object_file_of_few_kernels():
    target, kernel = Target("aarch64-linux-gnu"), Variant(Tile(4, 4, 2), "fma", True, False)
    found = kernels.emit_object(target, [kernel])
    assert kernel.name.encode() in found
    assert b"fma_1x4x1" not in found
    none = len(kernels.emit_object(target, []))  # the functions that are no convolutions
    assert 0 < len(found) - none < (len(kernels.emit_object(target)) - none) / 4
