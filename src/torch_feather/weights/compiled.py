"""The passes over float32 weights on a CPU as compiled loops, if llvmlite is installed.

They give the bits of `plain.py`, which is used otherwise. `TORCH_FEATHER_COMPILED=0` in the
environment turns them off.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import devices
from ..operators import Operator, Power
from ..threads import for_each, scratch
from .kernels import emit_module
from .latent import copy_all

COLUMNS = 509
"""64-bit words in a row of a checksum. A prime, so that exchanged rows or channels rarely keep
their words in the same columns."""
CHUNK = 1 << 18
"""Weights per call: few calls, and enough of them for several threads."""

_pointer, _number, _bits, _float = (
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float,
)  # fmt: skip
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "copy": (None, _pointer, _pointer, _number),
    "scan": (_bits, _pointer, _number, _pointer),
} | {
    name: (
        _number, _pointer, _pointer, _number, _float, _bits, _bits, _pointer, _pointer
    ) for name in ("collect", "read")
} | {
    f"write_{kind}": (None, _pointer, _pointer, _number, _bits, _float, _float)
    for kind in ("hard", 1, 2, 3)
}
"""Type of the result and of the arguments of each function."""


class Kernels:
    """The compiled functions.

    Attributes:
        width: float32 numbers in a vector.
        functions: by name; each releases the GIL.

    Args:
        columns: 64-bit words in a row of a checksum.

    Raises:
        ImportError: llvmlite is not installed.

    Example:
        >>> found = kernels()
        >>> if found:
        ...     assert "copy" in found.functions
    """

    def __init__(self, columns: int):
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        features = llvm.get_host_cpu_features()
        self.width = 16 if features.get("avx512f") else 8 if features.get("avx2") else 4
        # Since AVX-512, one instruction moves the lanes of a mask together.
        packs = self.width == 16
        module = llvm.parse_assembly(emit_module(self.width, columns, packs))
        module.verify()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(),
            features=features.flatten() + ",-prefer-256-bit" * bool(features.get("avx512f")),
            opt=3,
        )
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(module, builder)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self.functions = {
            name: ctypes.CFUNCTYPE(*types)(self._engine.get_function_address(name))
            for name, types in ARGUMENTS.items()
        }


_compiling = threading.Lock()


def kernels() -> Kernels | None:
    """Return the compiled functions, compiled on the first call; None if they are not available.

    Example:
        >>> found = kernels()
        >>> found is None or found.width >= 4
        True
    """
    with _compiling:
        return _kernels()


@functools.cache
def _kernels() -> Kernels | None:
    if os.environ.get("TORCH_FEATHER_COMPILED") == "0":
        return None
    try:
        return Kernels(COLUMNS)
    except (ImportError, OSError, RuntimeError):  # no llvmlite, or no code for this processor
        return None


def copy_weights(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, in place.

    Args:
        targets: tensors to write.
        sources: as many tensors, of the same shapes.

    Example:
        >>> target = torch.zeros(2)
        >>> copy_weights([target], [torch.ones(2)])
        >>> target
        tensor([1., 1.])
    """
    found = kernels()
    if found is None or not all(map(_is_simple, targets, sources)):
        copy_all(targets, sources)
        return
    copy = found.functions["copy"]
    chunks = [
        (source.data_ptr() + 4 * a, target.data_ptr() + 4 * a, min(CHUNK, target.numel() - a))
        for target, source in zip(targets, sources, strict=True)
        for a in range(0, target.numel(), CHUNK)
    ]
    for_each(lambda chunk: copy(*chunk), chunks)
    torch.autograd.graph.increment_version(list(targets))


def copy_memory(target: np.ndarray, source: np.ndarray) -> None:
    """Copy flat memory, as integers of 2, 4 or 8 bytes.

    Example:
        >>> target = np.zeros(2, np.int32)
        >>> copy_memory(target, np.ones(2, np.int32))
        >>> target.tolist()
        [1, 1]
    """
    found = kernels()
    if found is None or target.itemsize != 4:
        np.copyto(target, source)
    else:
        found.functions["copy"](source.ctypes.data, target.ctypes.data, target.size)


def _is_simple(target: Tensor, source: Tensor) -> bool:
    """Return whether memory can be copied as it is."""
    same = target.dtype == source.dtype == torch.float32 and target.stride() == source.stride()
    return same and not (devices.synchronizes(target.device) or devices.synchronizes(source.device))


def scan(words: np.ndarray, columns: np.ndarray) -> bool:
    """Add words to the columns of a checksum; return whether a weight is not finite.

    Args:
        words: 64-bit words of float32 weights, from the start of a row on.
        columns: int64 of shape (COLUMNS,).

    Example:
        >>> columns = np.zeros(COLUMNS, np.int64)
        >>> if kernels():
        ...     assert not scan(np.ones(2 * COLUMNS, np.int64), columns)
        ...     assert columns.sum() == 2 * COLUMNS
    """
    found = kernels()
    assert found is not None
    return bool(found.functions["scan"](words.ctypes.data, words.size, columns.ctypes.data))


def collect(
    w: np.ndarray,
    scale: float | np.floating | None,
    low: int,
    high: int,
    source: np.ndarray | None = None,
) -> tuple[int, np.ndarray]:
    """Count scores and collect them, as `Scores.collect`; only if there are `kernels`.

    Args:
        w: float32 weights, flat.
        scale: scores are |w| times this; None for |w|.
        low: the lower bound, as an integer.
        high: the upper bound, as an integer.
        source: memory that is copied into `w` first; None to copy nothing.

    Example:
        >>> if kernels():
        ...     below, near = collect(np.float32([1.0, 2.0, 3.0]), None, 0x3F800000, 0x40400000)
        ...     assert below == 1 and near.view(np.float32).tolist() == [2.0]
    """
    found = kernels()
    assert found is not None
    # The last vector that is stored may reach beyond the collected scores.
    near, number = scratch("near", w.size + found.width, np.int32), np.zeros(1, np.int64)
    factor = 1.0 if scale is None else float(scale)
    function, held = found.functions["collect" if source is None else "read"], w.ctypes.data
    count = function(
        held if source is None else source.ctypes.data, held, w.size,
        factor, low, high, near.ctypes.data, number.ctypes.data,
    )  # fmt: skip
    return count, near[: int(number[0])].copy()


def write(
    w: np.ndarray,
    out: np.ndarray,
    limit: int,
    operator: Operator,
    tau: np.ndarray,
    scale: float | np.floating | None,
) -> bool:
    """Write effective weights; return whether there is a compiled function for them.

    Args:
        w: latent weights, flat.
        out: memory for the effective weights, as integers.
        limit: weights are pruned if the bits of their score are at most this.
        operator: one that `is_plain` knows.
        tau: threshold of the operator, 0-dimensional.
        scale: scores are |w| times this; None for |w|.

    Example:
        >>> from torch_feather.operators import Hard
        >>> u = np.zeros(2, np.int32)
        >>> if write(np.float32([1.0, 3.0]), u, 0x3F800000, Hard(), np.float32(1.0), None):
        ...     assert u.view(np.float32).tolist() == [0.0, 3.0]
    """
    found = kernels()
    if found is None or w.dtype != np.float32:
        return False
    kind = int(operator.p) if isinstance(operator, Power) and tau > 0 else "hard"
    factor = 1.0 if scale is None else float(scale)
    function = found.functions[f"write_{kind}"]
    function(w.ctypes.data, out.ctypes.data, w.size, limit, float(tau), factor)
    return True
