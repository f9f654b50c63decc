"""The Triton kernels: interpreted, compiled for devices that are not here, run where one is."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import compiled_kernel
from selection_cases import MAKERS, assert_same_cutoff, make

from torch_feather import launching
from torch_feather.selection.device import TorchPasses, default_passes, select_device
from torch_feather.selection.float_bits import FLOAT_BITS
from torch_feather.selection.reference import select_reference

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton does not exist for this platform"
)
COUNTS = (0, 1, 4097, 8550, 9000, 9001)


@pytest.mark.slow
@needs_triton
def test_interpreted_kernels_find_the_reference_cutoff():
    script = Path(__file__).parent / "interpreted.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip() == "checked"


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        ("bf16", 90),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in [("fp32", 80), ("fp32", 90), ("fp64", 90)]
        ),
    ],
)
@pytest.mark.slow
def test_kernels_compile_without_a_device(dtype, target, tmp_path, monkeypatch):
    from torch_feather.selection import triton_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    width = 64 if dtype == "fp64" else 32
    bits = FLOAT_BITS[torch.float64 if width == 64 else torch.float32]
    scores = {"scores": f"*{dtype}", "size": "i64", "k": "*i64"}
    found = {"last": "*i64", "bits": f"*i{width}"}
    code = {"INFINITY": bits.infinity, "BLOCK": kernels.BLOCK}
    minus_one = {"MINUS_ONE": kernels.MINUS_ONE[width]}
    pass_ = code | {"STATE": kernels.STATE, "DESCENDS": True}
    first, second, *_ = kernels.DIGITS[width]
    shift = width - 1 - first
    space = {"space": "*i64"}
    for function, arguments, constants in (
        (kernels._count_digits, scores | space,
         pass_ | {"SHIFT": shift, "WIDTH": first, "FIRST": True}),
        (kernels._count_digits, scores | space,
         pass_ | {"SHIFT": shift - second, "WIDTH": second, "FIRST": False}),
        (kernels._find_tie, scores | space | found,
         code | minus_one | {"STATE": kernels.STATE, "MOST_PROGRAMS": kernels.MOST_PROGRAMS}),
        (kernels._select_small, scores | found,
         code | minus_one | {"WIDTH": width, "BLOCK": kernels.SMALL}),
    ):  # fmt: skip
        binary = compiled_kernel(function, arguments, constants, target)
        assert binary.asm["cubin"]
        assert binary.metadata.shared <= 48 * 1024  # what every device grants without asking


def test_pytorch_is_used_with_a_warning_if_triton_does_not_work(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(launching, "launch", broken)
    launching._works.cache_clear()
    if importlib.util.find_spec("triton") is None:
        assert not launching._works(torch.device("cpu"))
    else:
        with pytest.warns(UserWarning, match="Triton does not work.*no C compiler"):
            assert not launching._works(torch.device("cpu"))
    launching._works.cache_clear()


def test_pytorch_is_used_silently_without_triton(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "torch_feather.probe_kernel", None)
    launching._works.cache_clear()
    assert not launching._works(torch.device("cpu"))
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    launching._works.cache_clear()


def implementations():
    from torch_feather.selection.triton_kernels import TritonPasses

    return {"pytorch": TorchPasses, "triton": TritonPasses, "chosen": None}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MAKERS)
def test_on_cuda_both_find_the_reference_cutoff(kind, dtype):
    for size in (9001, 300_001):
        scores = make(kind, size, seed=1, dtype=dtype)
        for k in (*COUNTS, size):
            expected = select_reference(scores, k)
            for how, passes in implementations().items():
                cutoff = select_device(scores.cuda(), k, passes=passes)
                assert_same_cutoff(type(cutoff)(*(field.cpu() for field in cutoff)), expected, how)


@pytest.mark.gpu
def test_cuda_tensors_use_triton():
    assert default_passes(torch.ones(3, device="cuda")).__name__ == "TritonPasses"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pytorch", "triton", "chosen"])
def test_on_cuda_nothing_synchronises(name):
    passes = implementations()[name]
    scores, k = torch.rand(100_000, device="cuda"), torch.full((), 95_000, device="cuda")
    select_device(scores, k, passes=passes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cutoff = select_device(scores, k, passes=passes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(cutoff.pruned(scores).sum()) == 95_000


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pytorch", "triton"])
def test_one_cuda_graph_serves_every_count(name):
    passes = implementations()[name]
    scores, k = (
        torch.rand(9001, device="cuda").bfloat16().float(),
        torch.zeros((), device="cuda").long(),
    )
    select_device(scores, k, passes=passes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cutoff = select_device(scores, k, passes=passes)
    for count in COUNTS:
        k.fill_(count)
        graph.replay()
        on_host = type(cutoff)(*(field.cpu() for field in cutoff))
        assert_same_cutoff(on_host, select_reference(scores.cpu(), count), str(count))


@pytest.mark.gpu
def test_on_cuda_compiled_finds_the_reference_cutoff():
    torch._dynamo.reset()
    compiled = torch.compile(select_device, fullgraph=True)
    scores = make("bf16", 9001, seed=0, dtype=torch.float32)
    for k in COUNTS:
        cutoff = compiled(scores.cuda(), torch.tensor(k, device="cuda"))
        on_host = type(cutoff)(*(field.cpu() for field in cutoff))
        assert_same_cutoff(on_host, select_reference(scores, k), str(k))
