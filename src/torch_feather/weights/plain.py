"""The effective weights on a CPU with NumPy, block by block in the cache.

`compiled.py` has the same passes as compiled loops, with the same bits, and is preferred.
`passes.py` has the form for other devices.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import roots
from ..operators import Operator, Power
from ..selection.cpu import INTEGER, magnitude_bits
from ..threads import for_each, scratch
from . import compiled
from .checksum import column_sums
from .kept import kept_values
from .latent import BLOCK, LatentWeights, flat_bits, flat_of
from .ranges import COLUMNS, groups, ranges
from .rows import NO_FACTORS, multiply_rows
from .scores import as_array
from .segments import Segment, segment_of
from .spans import Span, is_plain, keeps_all, spans
from .sums import Recorded, Sums, versions

DENSE = 0.25
"""Kept fraction of a block above which all its weights are computed, not the kept ones alone."""


def write_effective(
    weights: LatentWeights,
    segments: Sequence[Segment],
    operator: Operator,
    out: Sequence[Tensor],
    factors: Mapping[int, Tensor] = NO_FACTORS,
) -> None:
    """Write the effective weights; arguments as for `passes.write_effective`.

    Example:
        >>> from torch_feather.operators import Soft
        >>> from torch_feather.selection import Cutoff
        >>> weights, out = LatentWeights([torch.tensor([0.5, -1.0])]), torch.empty(2)
        >>> cutoff = Cutoff(torch.tensor(0.5), torch.tensor(1), torch.tensor(0.5))
        >>> write_effective(weights, [Segment(0, 2, cutoff)], Soft(), [out])
        >>> out
        tensor([ 0.0000, -0.5000])
    """
    every, found = list(spans(weights, segments)), ranges(weights)
    targets, flat = Targets(weights, out), list(found.of(out))
    starts = [span.piece.start for span in every]
    recorded = isinstance(out, Recorded)
    columns = np.empty((len(flat), COLUMNS), np.int64) if recorded else None

    def finish(j: int) -> bool:
        i = int(found.position[j])
        if i in factors:
            width = out[i].numel() // len(factors[i])
            multiply_rows(flat[j], int(found.start[j]), width, factors[i])
        return columns is not None and column_sums(flat[j], True, columns[j])[1]

    def write(group: slice) -> bool:
        first = int(found.local[group.start])
        last = int(found.local[group.stop - 1] + found.size[group.stop - 1])
        for j in range(bisect_right(starts, first) - 1, bisect_left(starts, last)):
            piece = every[j].piece
            a = max(first - piece.start, 0)
            b = min(last - piece.start, piece.values.numel())
            _write_range(weights.wide, operator, targets, every[j], a, b)
        return any([finish(j) for j in range(group.start, group.stop)])

    nonfinite = compiled.write_effective(
        weights, every, operator, out, None if factors else columns
    )
    if nonfinite is None:
        nonfinite = any(for_each(write, groups(weights)))
    elif factors:
        nonfinite = any(for_each(finish, range(len(flat))))
    torch.autograd.graph.increment_version(list(out))
    if isinstance(out, Recorded) and columns is not None:
        out.sums = Sums(versions(out), columns, nonfinite)


def pruned_mask(weights: LatentWeights, segment: Segment, i: int) -> Tensor:
    """Return the mask of pruned weights of tensor i, computed block by block.

    Args:
        weights: the latent weights, on the CPU.
        segment: the segment that holds the tensor.
        i: position of the weight tensor.

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([1.0, 1.0, 2.0])])
        >>> cutoff = Cutoff(torch.tensor(1.0), torch.tensor(0), torch.tensor(0.9))
        >>> pruned_mask(weights, Segment(0, 3, cutoff), 0)
        tensor([ True, False, False])
    """
    first, end = weights.local_spans[i]
    flat = torch.empty(end - first, dtype=torch.bool)
    out = flat.numpy()

    def compare(block: tuple[Span, int, int]) -> None:
        span, a, b = block
        np.less_equal(_bits(weights, span, a, b), span.limit, out=out[a - first : b - first])

    for_each(compare, _blocks(weights, segment, i))
    return flat.as_strided(weights.views[i].shape, weights.views[i].stride())


def count_pruned(weights: LatentWeights, segments: Sequence[Segment], i: int) -> int:
    """Return the number of pruned local weights of tensor i, without a mask.

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([1.0, 1.0, 2.0])])
        >>> cutoff = Cutoff(torch.tensor(1.0), torch.tensor(0), torch.tensor(0.9))
        >>> count_pruned(weights, [Segment(0, 3, cutoff)], 0)
        1
    """

    def count(block: tuple[Span, int, int]) -> int:
        return int(np.count_nonzero(_bits(weights, *block) <= block[0].limit))

    return sum(for_each(count, _blocks(weights, segment_of(weights, segments, i), i)))


def _blocks(weights: LatentWeights, segment: Segment, i: int) -> list[tuple[Span, int, int]]:
    """Return the blocks of local weights of tensor i: their span, start and stop."""
    first, end = weights.local_spans[i]
    found = []
    for span in spans(weights, [segment]):
        start = max(first, span.piece.start)
        stop = min(end, span.piece.start + span.piece.values.numel())
        found += [(span, a, min(a + BLOCK, stop)) for a in range(start, stop, BLOCK)]
    return found


def _bits(weights: LatentWeights, span: Span, a: int, b: int) -> np.ndarray:
    """Return the bits of the scores of local weights a to b, in memory of this thread."""
    w = as_array(span.piece.values[a - span.piece.start : b - span.piece.start], weights.wide)
    return magnitude_bits(w, span.piece.scale)


class Targets:
    """Where the effective weights of local weights are written.

    Args:
        weights: the layout.
        out: one local tensor per weight tensor, dense in memory.

    Example:
        >>> weights, out = LatentWeights([torch.ones(2), torch.ones(3)]), [torch.ones(2)] * 2
        >>> [(target.size, a, b) for target, a, b in Targets(weights, out).parts(1, 4)]
        [(1, 1, 2), (2, 2, 4)]
    """

    def __init__(self, weights: LatentWeights, out: Sequence[Tensor]):
        held = [i for i, view in enumerate(weights.views) if view.numel()]
        held.sort(key=weights.local_spans.__getitem__)
        self._spans = [weights.local_spans[i] for i in held]
        self._starts = [start for start, _ in self._spans]
        self._flat = [flat_bits(out[i]) for i in held]

    def write(self, start: int, bits: np.ndarray) -> None:
        """Write the bits of effective weights from local weight `start` on."""
        for target, a, b in self.parts(start, start + bits.size):
            target[:] = bits[a - start : b - start]

    def scatter(self, start: int, stop: int, index: np.ndarray, bits: np.ndarray) -> None:
        """Write zeros into local weights start to stop, except `bits` at the sorted `index`."""
        for target, a, b in self.parts(start, stop):
            target.fill(0)
            i, j = np.searchsorted(index, (a, b))
            target[index[i:j] - a] = bits[i:j]

    def parts(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, int, int]]:
        """Yield memory for the local weights start to stop, and which of them it holds."""
        for j in range(bisect_right(self._starts, start) - 1, len(self._spans)):
            first, end = self._spans[j]
            if first >= stop:
                return
            a, b = max(start, first), min(stop, end)
            yield self._flat[j][a - first : b - first], a, b


def _write_range(
    wide: torch.dtype, operator: Operator, targets: Targets, span: Span, first: int, end: int
) -> None:  # fmt: skip
    """Write the effective weights of a range of a span: those of dense blocks at once.

    Those of sparse blocks are computed together: most operations on them are shorter than a call of
    NumPy.
    """
    values, offset = span.piece.values[first:end], span.piece.start + first
    if keeps_all(operator, span):
        targets.write(offset, flat_bits(values))
        return
    w, tau = as_array(values, wide), span.tau.numpy()
    plain = is_plain(operator, span) and values.dtype == wide
    sparse: list[tuple[int, int]] = []
    indices: list[np.ndarray] = []
    for a in range(0, w.size, BLOCK):
        block = w[a : a + BLOCK]
        bits = magnitude_bits(block, span.piece.scale)
        limit = bits.dtype.type(span.limit)
        kept = np.greater(bits, limit, out=scratch("above", bits.size, bool))
        if plain and np.count_nonzero(kept) > DENSE * bits.size:
            u = plain_values(block, tau, operator).view(bits.dtype)
            mask = np.subtract(limit, bits, out=bits)
            mask >>= 8 * bits.itemsize - 1  # all bits are set if the score is above the limit
            mask &= u
            targets.write(offset + a, mask)
        else:
            index = np.flatnonzero(kept)
            index += a
            indices.append(index)
            sparse.append((a, a + bits.size))
    if sparse:
        index = np.concatenate(indices)
        chosen = w.take(index)
        if plain:
            u = plain_values(chosen, tau, operator).view(INTEGER[chosen.dtype])
        else:
            u = flat_bits(kept_values(torch.from_numpy(chosen), span.tau, operator, values.dtype))
        for a, b in sparse:
            i, j = np.searchsorted(index, (a, b))
            targets.scatter(offset + a, offset + b, index[i:j] + offset, u[i:j])


def plain_values(w: np.ndarray, tau: np.ndarray, operator: Operator) -> np.ndarray:
    """Return the effective values of kept weights, with the bits of the operator.

    Args:
        w: the weights, flat. Values that are not kept give any number.
        tau: threshold of the operator, 0-dimensional.
        operator: one that `is_plain` knows.

    Returns:
        The argument `w`, or memory of this thread.

    Example:
        >>> plain_values(np.float32([2.0]), np.float32(0.5), Power(1.0))
        array([1.5], dtype=float32)
    """
    if operator.is_identity or tau == 0:
        return w
    assert isinstance(operator, Power)
    with np.errstate(all="ignore"):
        out = scratch("values", w.size, w.dtype)
        if operator.p == 1.0:
            return np.subtract(w, np.copysign(tau, w, out=out), out=out)
        ratio = np.divide(tau, np.abs(w, out=out), out=out)
        power = np.multiply(ratio, ratio, out=scratch("power", w.size, w.dtype))
        if operator.p == 3.0:
            power *= ratio
        rest = np.subtract(np.float32(1), power, out=power)
        if operator.p == 2.0:
            np.maximum(rest, np.float32(0), out=rest)
            return np.multiply(np.sqrt(rest, out=rest), w, out=rest)
        # That of a kept weight is at least 3 * 2^-24.
        np.maximum(rest, np.float32(2.0**-24), out=rest)
        return np.multiply(_cube_root(rest, out), w, out=out)


def _cube_root(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Write the cube root of float32 numbers in (0, 1] into `y`, as in `roots.cube_root`."""
    number = np.float32
    bits, t = y.view(np.int32), scratch("cube", x.size, number)
    np.copyto(t, x.view(np.int32), casting="unsafe")
    t *= number(roots.THIRD)
    t += number(roots.SHIFT)
    np.copyto(bits, t, casting="unsafe")
    np.multiply(y, y, out=t)
    np.divide(x, t, out=t)
    t *= number(roots.THIRD)
    y *= number(roots.TWO_THIRDS)
    y += t
    bits += np.int32(roots.HALF_BIT)
    bits &= np.int32(roots.TOP_BITS)
    cube = np.multiply(y, y, out=t)
    cube *= y
    e = np.subtract(x, cube, out=x)
    e /= cube
    series = np.multiply(e, number(roots.THIRD_TERM), out=t)
    np.subtract(number(roots.SECOND), series, out=series)
    series *= e
    np.subtract(number(roots.FIRST), series, out=series)
    series *= e
    series *= y
    y += series
    return y
