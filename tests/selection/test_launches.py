"""Launches of a step on a GPU: counted in Triton's interpreter, and compiled without a device."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import compiled_kernel

from torch_feather.engine.fixed_memory import packed

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton does not exist for this platform"
)


@pytest.mark.slow
@needs_triton
def test_interpreted_steps_have_few_launches_and_the_bits_of_the_cpu():
    """See `launches.py` and `device_checks.py`; a step does not synchronize with the host."""
    script = Path(__file__).parent / "launches.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip().endswith("checked")


def arguments_of_write(kind: str) -> dict[str, str]:
    wide = "fp64" if kind == "fp64" else "fp32"
    numbers = dict.fromkeys(("cutoff", "tau", "scale"), f"*{wide}")
    return {"rows": "*i64", "latent": f"*{kind}", "base": "i64", "start": "i64", "last": "*i64"} | (
        numbers
    )


@needs_triton
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.slow
def test_kernels_round_each_product_and_sum(kind, tmp_path, monkeypatch):
    from torch_feather.weights import triton_kernels as kernels
    from torch_feather.weights.tables import BLOCK

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bits = {"fp32": 32, "bf16": 16, "fp16": 16, "fp64": 64}[kind]
    constants = {"SCALED": True, "DOUBLE": bits == 64, "BITS": bits, "BLOCK": BLOCK}
    for p in (0, 1) if bits == 64 else (0, 1, 2, 3):
        text = compiled_kernel(
            kernels.write_ranges, arguments_of_write(kind), constants | {"P": p}, 90
        ).asm["ptx"]
        assert not [word for word in ("fma", "approx", "div.full", "ftz") if word in text]
    if kind == "fp32":  # the check would find a fused operation
        fused = compiled_kernel(
            kernels.write_ranges, arguments_of_write(kind), constants | {"P": 3}, 90, fusion=True
        )
        assert "fma" in fused.asm["ptx"]
    for function, arguments in (
        (kernels.copy_ranges, {"rows": "*i64", "latent": f"*{kind}", "base": "i64"}),
        (kernels.adopt_ranges,
         {"rows": "*i64", "latent": f"*{kind}", "held": "i64", "given": "i64"}),
    ):  # fmt: skip
        reads = {"READS": True} if function is kernels.copy_ranges else {}
        assert compiled_kernel(function, arguments, reads | {"BLOCK": BLOCK}, 90).asm["cubin"]
    if bits < 64:
        pointers = dict.fromkeys(("gradient", "effective", "out"), f"*{kind}")
        numbers = {"cutoff": "*fp32", "size": "i64", "theta": "fp32"}
        text = compiled_kernel(kernels.scale_pruned, pointers | numbers, {"BLOCK": BLOCK}, 90).asm[
            "ptx"
        ]
        assert "fma" not in text


@needs_triton
def test_scalar_kernels_round_each_product_and_sum(tmp_path, monkeypatch):
    from torch_feather import scalar_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    step = {"step": "*i64", "steps": "i64", "out": "*fp64"}
    tables = {"targets": "*fp64", "rests": "*fp64", "zeros": "*i64"}
    sizes = {"tensors": "i32", "size": "i64"}
    count = {"sparsity": "*fp64", "size": "i64", "out": "*i64"}
    for function, arguments, constants in (
        (kernels._scheduled, step | tables | sizes, {"ZEROS": True, "CHUNK": kernels.CHUNK}),
        (kernels._count, count, {"ROUNDING": kernels.ROUNDING}),
        (kernels._progress, step, {}),
    ):
        text = compiled_kernel(function, arguments, constants, 90).asm["ptx"]
        assert "fma" not in text
        assert "approx" not in text


# Memory that is copied after a step


def test_numbers_that_fill_their_memory_are_copied_at_once():
    def cutoff(last: int, bits: float) -> list[torch.Tensor]:
        memory = torch.zeros(2, dtype=torch.int64)
        value, threshold = memory[1:].view(torch.float32).unbind()
        memory[0] = last
        value.fill_(bits)
        threshold.fill_(bits / 2)
        return [value, memory[0], threshold, torch.tensor(bits)]

    old, new = cutoff(3, 0.5), cutoff(7, 0.25)
    targets, sources = packed(old, new)
    assert len(targets) == 2
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
    assert [one.item() for one in old] == [0.25, 7, 0.125, 0.25]


def test_numbers_among_others_are_copied_alone():
    old, new = torch.zeros(4), torch.ones(4)
    for target, source in zip(*packed([old[0], old[2]], [new[0], new[2]]), strict=True):
        target.copy_(source)
    assert old.tolist() == [1, 0, 1, 0]  # the others stay
    swapped = packed([old[0], old[1]], [new[1], new[0]])
    assert [one.numel() for one in swapped[0]] == [1, 1]
