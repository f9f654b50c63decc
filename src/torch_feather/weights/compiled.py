"""The passes over float32 weights on a CPU as compiled loops, if llvmlite is installed.

They give the bits of `plain.py`, which is used otherwise. `TORCH_FEATHER_COMPILED=0` in the
environment turns them off.

A pass reads a table. A row describes a range of weights:

    latent, parameter, size    addresses of its latent weights and of its parameters; their number
    low, high                  bounds of the magnitudes to collect, as bits
    below, begin, end          how many are at most `low`; where the collected ones are
    limit, tau, scale          weights with scores up to `limit`, as bits, are pruned; see `Span`
    whole, count               address and number of the weights to sum; for whole ranges
    checksum                   of the parameters
    flag                       whether the checksum differs, or a weight is NaN or infinite
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import devices
from ..operators import Operator, Power
from ..threads import for_each, scratch
from .checksum import FACTORS
from .latent import LatentWeights
from .ranges import ranges
from .spans import Span, is_plain, overlaps
from .table_kernels import FIELDS, emit_module

ROW = np.dtype(
    [
        (name, {"ptr": np.int64, "i64": np.int64, "i32": np.int32, "float": np.float32}[kind])
        for name, kind in FIELDS.items()
    ]
)
"""Type of a row of a table."""

ROOM = 1 << 14
"""Magnitudes that a thread has room for, in addition to a 32nd of all. Then a bracket from a sample
fits for every number of weights; it holds about four times their number to the power of 2/3."""

_pointer, _number = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "leave": (_pointer, _number),
    "enter": (_pointer, _number, _pointer, _number),
    "collect": (_pointer, _number, _pointer, _number),
} | {f"update_{kind}": (_pointer, _number) for kind in ("hard", 1, 2, 3)}
"""Type of the arguments of each function."""


class Kernels:
    """The compiled functions.

    Attributes:
        width: float32 numbers in a vector.
        functions: by name; each releases the GIL.

    Args:
        width: float32 numbers in a vector; None for the widest of this processor.

    Raises:
        ImportError: llvmlite is not installed.

    Example:
        >>> found = kernels()
        >>> if found:
        ...     assert "leave" in found.functions
    """

    def __init__(self, width: int | None = None):
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        features = llvm.get_host_cpu_features()
        widest = 16 if features.get("avx512f") else 8 if features.get("avx2") else 4
        self.width = width or widest
        # AVX-512 has instructions that move the lanes of a mask together.
        tables = self.width == 8 and features.get("avx2", False)
        packs = tables or self.width == 16
        module = llvm.parse_assembly(emit_module(self.width, FACTORS.tolist(), packs, tables))
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
            name: ctypes.CFUNCTYPE(None, *types)(self._engine.get_function_address(name))
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
        return Kernels()
    except (ImportError, OSError, RuntimeError):  # no llvmlite, or no code for this processor
        return None


def table(weights: LatentWeights, parameters: Sequence[Tensor]) -> np.ndarray | None:
    """Return a table with a row for each of the `ranges` of the weights.

    Args:
        weights: the latent weights.
        parameters: a local tensor for each of them.

    Returns:
        Rows with `latent`, `parameter` and `size`; None if the passes are not compiled, or not for
        these tensors. The rows hold addresses, so the tensors must outlive them.

    Example:
        >>> w = torch.ones(100_000)
        >>> rows = table(LatentWeights([w]), [w])
        >>> if kernels():
        ...     assert rows["size"].tolist() == [65152, 34848]
    """
    if kernels() is None or devices.synchronizes(weights.device):
        return None
    # The last table is kept: in most steps all tensors are where they were.
    kept: dict[str, Any] = weights.constant("table", lambda _: {})
    places = [
        *[part.flat.data_ptr() for part in weights.parts],
        *[(t.data_ptr(), t.dtype, t.stride()) for t in parameters],
    ]
    if kept.get("places") != places:
        kept.clear()
        kept.update(places=places, rows=_new_table(weights, parameters))
    return None if kept["rows"] is None else kept["rows"].copy()


def _new_table(weights: LatentWeights, parameters: Sequence[Tensor]) -> np.ndarray | None:
    if not all(map(_is_simple, weights.views, parameters)):
        return None
    found = ranges(weights)
    rows = np.zeros(len(found.size), ROW)
    rows["size"] = found.size
    for field, tensors in (("latent", weights.views), ("parameter", parameters)):
        rows[field] = np.array([t.data_ptr() for t in tensors])[found.position] + 4 * found.start
    return rows


def empty_table(size: int) -> np.ndarray:
    """Return a table of zeros.

    Example:
        >>> len(empty_table(2))
        2
    """
    return np.zeros(size, ROW)


def _is_simple(target: Tensor, source: Tensor) -> bool:
    """Return whether both have the same layout of float32 numbers on a CPU."""
    same = target.dtype == source.dtype == torch.float32 and target.stride() == source.stride()
    return same and not (devices.synchronizes(target.device) or devices.synchronizes(source.device))


def leave(rows: np.ndarray) -> None:
    """Copy latent weights into parameters if these have the given checksum.

    Args:
        rows: a table with `checksum`. `latent` may be 0: then nothing is copied. `flag` becomes 1
            if the checksum differs.

    Example:
        >>> weights, u = LatentWeights([torch.ones(2)]), torch.zeros(2)
        >>> rows = table(weights, [u])
        >>> if rows is not None:
        ...     leave(rows)
        ...     assert u.tolist() == [1, 1]
    """
    _for_each_part("leave", rows)


def collect(rows: np.ndarray, copies: bool) -> np.ndarray | None:
    """Count and collect magnitudes of parameters, which may be copied into latent weights.

    Args:
        rows: a table with `low` and `high`. `below` becomes the number of scores up to `low`, and
            `end` the end of the collected ones.
        copies: whether to copy; otherwise the scores are magnitudes times `scale`.

    Returns:
        The scores between the bounds as bits; None if they are too many to hold.

    Example:
        >>> weights, u = LatentWeights([torch.zeros(3)]), torch.tensor([1.0, -2.0, 3.0])
        >>> rows = table(weights, [u])
        >>> if rows is not None:
        ...     rows["low"], rows["high"] = np.float32([1.0, 3.0]).view(np.int32)
        ...     near = collect(rows, copies=True)
        ...     assert rows["below"] == 1 and near.view(np.float32).tolist() == [2.0]
    """
    found = kernels()
    assert found is not None
    function, width = found.functions["enter" if copies else "collect"], found.width

    def collect_part(part: np.ndarray) -> np.ndarray | None:
        room = int(part["size"].sum()) // 32 + ROOM
        # The last vector that is stored may reach beyond the room.
        near = scratch("near", room + width, np.int32)
        function(part.ctypes.data, len(part), near.ctypes.data, room)
        end = int(part["end"][-1])
        return None if end > room else near[:end].copy()

    parts = _parts(rows)
    found_by_part = for_each(collect_part, parts)
    collected = [near for near in found_by_part if near is not None]
    if len(collected) < len(parts):
        return None
    start = 0
    for part, near in zip(parts, collected, strict=True):
        part["end"] += start
        start += near.size
    return collected[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *collected])


def write_effective(
    weights: LatentWeights, every: Sequence[Span], operator: Operator, out: Sequence[Tensor],
    checksums: np.ndarray | None = None,
) -> bool | None:  # fmt: skip
    """Write the effective weights and their checksums, if there is a compiled function for them.

    Args:
        weights: the latent weights.
        every: all spans in their order.
        operator: gives the values of kept weights.
        out: local tensors to write.
        checksums: int64 of shape (ranges,) to write; None to compute none.

    Returns:
        Whether a checksum found NaN or infinity; None if nothing was written.

    Example:
        >>> from torch_feather.operators import Hard
        >>> from torch_feather.weights.spans import Piece
        >>> weights, u = LatentWeights([torch.tensor([1.0, 3.0])]), torch.zeros(2)
        >>> span = Span(Piece(weights.flats[0], 0), 0x3F800000, torch.tensor(1.0))
        >>> if write_effective(weights, [span], Hard(), [u]) is not None:
        ...     assert u.tolist() == [0.0, 3.0]
    """
    rows = table(weights, out)
    if rows is None or not all(is_plain(operator, span) for span in every):
        return None
    # The rows are kept, too: the spans change if the largest pruned score is tied.
    kept: dict[str, Any] = weights.constant("table", lambda _: {})
    starts = [span.piece.start for span in every]
    if kept.get("starts") != starts:
        kept.update(starts=starts, parts=_rows_of_spans(weights, rows, every))
    rows, span_of = kept["parts"]
    rows = rows.copy()
    scales = [1.0 if span.piece.scale is None else float(span.piece.scale) for span in every]
    for field, values in (
        ("limit", [span.limit for span in every]),
        ("tau", [0.0 if span.limit < 0 else float(span.tau) for span in every]),
        ("scale", scales),
    ):
        rows[field] = np.array(values)[span_of]
    summed = rows["count"] > 0
    if checksums is None:
        rows["count"] = 0  # nothing is summed
    # Other operators are here only if all weights are kept.
    known = isinstance(operator, Power) and operator.p in (1.0, 2.0, 3.0)
    kind = int(operator.p) if known else "hard"  # type: ignore[attr-defined]
    _for_each_part(f"update_{kind}", rows)
    if checksums is not None:
        checksums[:] = rows["checksum"][summed]
    return bool(rows["flag"].any())


def _rows_of_spans(
    weights: LatentWeights, whole: np.ndarray, every: Sequence[Span]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a table with a row for each overlap of a range and a span.

    Args:
        weights: the latent weights.
        whole: a table with a row for each range.
        every: all spans in their order.

    Returns:
        The table, whose last row of each range sums all of it; and the number of the span of each
        row.
    """
    found = ranges(weights)
    range_of, span_of, starts, sizes = overlaps(found, every)
    rows = whole[range_of]
    for field in ("latent", "parameter"):
        rows[field] += 4 * (starts - found.local[range_of])
    rows["size"], rows["whole"] = sizes, whole["parameter"][range_of]
    last = np.append(range_of, -1)[1:] != range_of
    rows["count"][last] = whole["size"][range_of[last]]
    return rows, span_of


def sum_rows(rows: np.ndarray) -> None:
    """Compute the checksum of parameters.

    Args:
        rows: a table. `flag` becomes 1 if a parameter is NaN or infinite.

    Example:
        >>> from torch_feather.weights.checksum import checksum
        >>> weights, u = LatentWeights([torch.ones(2)]), torch.ones(2)
        >>> rows = table(weights, [u])
        >>> if rows is not None:
        ...     sum_rows(rows)
        ...     assert rows["checksum"].tolist() == [checksum(u)]
    """
    rows["whole"], rows["count"] = rows["parameter"], rows["size"]
    rows["size"] = 0  # nothing is written
    _for_each_part("update_hard", rows, rows["count"])


def _for_each_part(name: str, rows: np.ndarray, work: np.ndarray | None = None) -> None:
    """Call a compiled function for all rows, by several threads."""
    found = kernels()
    assert found is not None
    function = found.functions[name]
    for_each(lambda part: function(part.ctypes.data, len(part)), _parts(rows, work))


def _parts(rows: np.ndarray, work: np.ndarray | None = None) -> list[np.ndarray]:
    """Return the rows in parts of about equal work, one for each thread.

    Args:
        rows: a table.
        work: of each row; None for its size.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [rows] if len(rows) else []
    ends = np.cumsum(rows["size"] if work is None else work)
    shares = np.arange(1, threads) * (ends[-1] if len(ends) else 0) // threads
    bounds = [0, *np.searchsorted(ends, shares).tolist(), len(rows)]
    return [rows[a:b] for a, b in pairwise(bounds) if a < b]
