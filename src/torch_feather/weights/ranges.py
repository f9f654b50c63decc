"""Ranges of weights that stay in a CPU's cache from one pass to the next, and groups of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from .. import devices
from ..threads import for_each
from .candidates import Candidates
from .latent import LatentWeights, flat_bits, flat_of

Result = TypeVar("Result")

COLUMNS = 509
"""64-bit words in a row of a checksum. A prime, so that exchanged rows or channels rarely keep
their words in the same columns."""
ROW_BYTES = 8 * COLUMNS
RANGE = 64 * ROW_BYTES // 4
"""Most weights in a range. For all types, a multiple of this begins at a row of a checksum."""
GROUP = 4 * RANGE
"""Most weights in a group."""


Span = tuple[int, int]
"""The start and the end of neighbouring local weights."""


class Ranges(NamedTuple):
    """Local weights in ranges of one tensor each: int64 arrays with an entry per range.

    Example:
        >>> import torch
        >>> ranges(LatentWeights([torch.ones(2), torch.ones(300_000)])).start
        array([     0,      0,  65152, 130304, 195456, 260608])
    """

    position: np.ndarray
    """Position of the weight tensor."""
    start: np.ndarray
    """First weight, in the order of the tensor's memory."""
    size: np.ndarray
    """Number of weights."""
    local: np.ndarray
    """Position of the first weight among the local ones; ascending."""

    def of(self, tensors: Sequence[Tensor]) -> list[np.ndarray]:
        """Return the memory of each range as integers of the width of its values.

        Args:
            tensors: one per weight tensor, dense in memory, on a CPU.
        """
        flat = [flat_bits(tensor) for tensor in tensors]
        triples = zip(*(x.tolist() for x in self[:3]), strict=True)
        return [flat[i][a : a + n] for i, a, n in triples]


def arrays(weights: LatentWeights, tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Return `Ranges.of` tensors, kept as long as the tensors stay where they are.

    Args:
        weights: the latent weights, on a CPU.
        tensors: their views, or one local tensor for each of them.

    Example:
        >>> import torch
        >>> u, weights = torch.ones(2), LatentWeights([torch.ones(2)])
        >>> found = arrays(weights, [u])
        >>> found is arrays(weights, [u]), found is arrays(weights, [-u])
        (True, False)
    """
    kept: dict[bool, Any] = weights.constant("arrays", lambda _: {})
    latent = tensors is weights.views
    places = [(tensor.data_ptr(), tensor.dtype, tensor.stride()) for tensor in tensors]
    if latent not in kept or kept[latent][0] != places:
        kept[latent] = places, ranges(weights).of(tensors)
    found: list[np.ndarray] = kept[latent][1]
    return found


def forget_arrays(weights: LatentWeights) -> None:
    """Release what `arrays` keeps, which holds the memory of tensors.

    Args:
        weights: the latent weights.

    Example:
        >>> import torch
        >>> weights = LatentWeights([torch.ones(2)])
        >>> found = arrays(weights, weights.views)
        >>> forget_arrays(weights)
        >>> arrays(weights, weights.views) is found
        False
    """
    weights.constant("arrays", lambda _: {}).clear()


def wide_array(bits: np.ndarray, dtype: torch.dtype, wide: torch.dtype) -> np.ndarray:
    """Return values as an array of type `wide`, in their own memory if they have this type.

    Args:
        bits: values as integers of their width.
        dtype: their type.
        wide: float32 or float64.

    Example:
        >>> wide_array(np.int16([0x3F80]), torch.bfloat16, torch.float32)
        array([1.], dtype=float32)
    """
    if dtype == wide:
        return bits.view(f"f{bits.itemsize}")
    return torch.from_numpy(bits).view(dtype).to(wide).numpy()


def flat_arrays(*tensors: Tensor) -> list[np.ndarray] | None:
    """Return dense tensors on a CPU as flat arrays in the order of their memory.

    Args:
        tensors: of one shape; the first is dense in memory.

    Returns:
        None if they have several layouts or types, or one that NumPy has not, or lie elsewhere.

    Example:
        >>> import torch
        >>> w = torch.ones(2, 3)
        >>> flat_arrays(w, w.t().contiguous().t()), [x.size for x in flat_arrays(w, 2 * w)]
        (None, [6, 6])
    """
    first = tensors[0]
    if first.dtype not in (torch.float32, torch.float64) or devices.synchronizes(first.device):
        return None
    for t in tensors:
        plain = type(t) in (Tensor, Parameter) and t.layout == torch.strided
        if not plain or t.dtype != first.dtype or t.stride() != first.stride():
            return None
    return [flat_of(t).numpy() for t in tensors]


def ranges(weights: LatentWeights) -> Ranges:
    """Return the ranges of all local weights in their order.

    Args:
        weights: the latent weights.

    Example:
        >>> import torch
        >>> ranges(LatentWeights([torch.ones(2), torch.ones(300_000)])).size
        array([    2, 65152, 65152, 65152, 65152, 39392])
    """
    return weights.constant("ranges", _ranges)


def _ranges(weights: LatentWeights) -> Ranges:
    spans = sorted((span, i) for i, span in enumerate(weights.local_spans) if span[0] < span[1])
    every = [
        (i, a, min(RANGE, last - first - a), first + a)
        for (first, last), i in spans
        for a in range(0, last - first, RANGE)
    ]
    return Ranges(*np.array(every, np.int64).reshape(-1, 4).T)


def rows_of(weights: LatentWeights, span: Span) -> slice:
    """Return which of the `ranges` are within a span, whose bounds are bounds of weight tensors.

    Example:
        >>> import torch
        >>> rows_of(LatentWeights([torch.ones(2), torch.ones(3)]), (2, 5))
        slice(1, 2, None)
    """

    def find(weights: LatentWeights) -> slice:
        return slice(*np.searchsorted(ranges(weights).local, span).tolist())

    found: slice = weights.constant(("rows", span), find)
    return found


def of_ranges(
    weights: LatentWeights, function: Callable[..., Result], *more: Sequence[Tensor]
) -> list[Result]:
    """Return a function of the weights of each range, called by several threads.

    Args:
        weights: the latent weights, on a CPU.
        function: called with the weights of a range as a flat array of type `wide`, and with the
            same range of other tensors.
        more: tensors in the shapes, layouts and types of the weight tensors.

    Example:
        >>> import torch
        >>> weights = LatentWeights([torch.ones(2), torch.ones(3)])
        >>> of_ranges(weights, lambda w, g: float((w * g).sum()), [-torch.ones(2), torch.ones(3)])
        [-2.0, 3.0]
    """
    found = ranges(weights)
    dtypes = [weights.views[i].dtype for i in found.position.tolist()]

    def call(task: tuple[torch.dtype, *tuple[np.ndarray, ...]]) -> Result:
        dtype, *parts = task
        return function(*(wide_array(part, dtype, weights.wide) for part in parts))

    columns = [arrays(weights, weights.views), *(found.of(tensors) for tensors in more)]
    return for_each(call, list(zip(dtypes, *columns, strict=True)))


def known_candidates(weights: LatentWeights) -> dict[int, Candidates]:
    """Return the candidates by range, unless the weights were changed since they were found.

    Example:
        >>> import torch
        >>> known_candidates(LatentWeights([torch.ones(2)]))
        {}
    """
    now = [flat._version for flat in weights.flats]
    return weights.candidates if weights.candidate_versions == now else {}


def groups(weights: LatentWeights) -> list[slice]:
    """Return the ranges in groups of neighbours of one type, with at most `GROUP` weights.

    Args:
        weights: the latent weights.

    Example:
        >>> import torch
        >>> groups(LatentWeights([torch.ones(2), torch.ones(3), torch.ones(300_000)]))
        [slice(0, 5, None), slice(5, 7, None)]
    """
    return weights.constant("groups", _groups)


def _groups(weights: LatentWeights) -> list[slice]:
    found: list[slice] = []
    every, starts = ranges(weights), {part.start for part in weights.parts}
    size = 0
    for j, (n, local) in enumerate(zip(every.size.tolist(), every.local.tolist(), strict=True)):
        if not found or size + n > GROUP or local in starts:
            found.append(slice(j, j))
            size = 0
        found[-1], size = slice(found[-1].start, j + 1), size + n
    return found
