"""The passes over weights on a CPU with NumPy, range by range in the cache.

`compiled.py` has the same passes as compiled loops, with the same bits, and is preferred.
`passes.py` has the form for other devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import roots
from ..operators import Operator, Power
from ..selection.cpu import INTEGER, magnitude_bits
from ..threads import for_each, scratch
from . import compiled
from .candidates import Candidates
from .checksum import column_sums
from .kept import kept_values
from .latent import LatentWeights, flat_bits
from .ranges import COLUMNS, groups, ranges
from .rows import NO_FACTORS, multiply_rows
from .scores import as_array
from .segments import Segment
from .spans import Span, is_plain, keeps_all, overlaps, spans
from .sums import Recorded, Sums, versions

DENSE = 0.25
"""Kept fraction of a range above which all its weights are computed, not the kept ones alone."""
SLICE = 1 << 14
"""Weights of a dense range that are computed together: their temporary values stay in the cache."""


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
    flat = list(found.of(out))
    recorded = isinstance(out, Recorded)
    columns = np.empty((len(flat), COLUMNS), np.int64) if recorded else None

    def finish(j: int) -> bool:
        """Multiply and sum range j; return whether a value may be NaN or infinite."""
        i = int(found.position[j])
        if i in factors:
            width = out[i].numel() // len(factors[i])
            multiply_rows(flat[j], int(found.start[j]), width, factors[i])
        return columns is not None and column_sums(flat[j], True, columns[j])[1]

    nonfinite = compiled.write_effective(
        weights, every, operator, out, None if factors else columns
    )
    if nonfinite is None:
        pieces = _pieces(weights, every, flat)

        def write(group: slice) -> bool:
            inside = range(group.start, group.stop)
            _write([piece for j in inside for piece in pieces[j]], operator, weights.wide)
            return any([finish(j) for j in inside])

        nonfinite = any(for_each(write, groups(weights)))
    elif factors:
        nonfinite = any(for_each(finish, range(len(flat))))
    torch.autograd.graph.increment_version(list(out))
    if isinstance(out, Recorded) and columns is not None:
        out.sums = Sums(versions(out), columns, nonfinite)


class PieceOfSpan(NamedTuple):
    """The overlap of a range and a span.

    Example:
        >>> span = Span(Piece(torch.ones(2), 0), 3, torch.tensor(0.5))
        >>> PieceOfSpan(span, torch.ones(2), torch.zeros(2), None).span.limit
        3
    """

    span: Span
    latent: Tensor
    out: Tensor
    candidates: Candidates | None
    """Those of the range, if the piece is all of it."""


def _pieces(
    weights: LatentWeights, every: Sequence[Span], out: Sequence[Tensor]
) -> list[list[PieceOfSpan]]:
    """Return the pieces of each of the `ranges`.

    Args:
        weights: the latent weights.
        every: all spans.
        out: the ranges of the memory to write.
    """
    found, candidates = ranges(weights), weights.candidates
    if weights.candidate_versions != versions(weights.flats):
        candidates = {}  # the weights were changed since then
    pieces: list[list[PieceOfSpan]] = [[] for _ in out]
    for j, k, start, size in zip(*(x.tolist() for x in overlaps(found, every)), strict=True):
        a, first = start - int(found.local[j]), start - every[k].piece.start
        latent = every[k].piece.values[first : first + size]
        known = candidates.get(j) if size == out[j].numel() else None
        pieces[j].append(PieceOfSpan(every[k], latent, out[j][a : a + size], known))
    return pieces


def _write(pieces: Sequence[PieceOfSpan], operator: Operator, wide: torch.dtype) -> None:
    """Write effective weights: those of dense pieces at once.

    Those of sparse pieces are computed together: most operations on them are shorter than a call of
    NumPy.
    """
    sparse: dict[int, list[tuple[PieceOfSpan, np.ndarray, np.ndarray]]] = {}
    for piece in pieces:
        span = piece.span
        if keeps_all(operator, span):
            np.copyto(flat_bits(piece.out), flat_bits(piece.latent))
            continue
        w, kept = as_array(piece.latent, wide), None
        if piece.candidates is not None and span.piece.scale is None:
            kept = piece.candidates.kept(w, span.limit)
        if kept is None:
            bits = magnitude_bits(w, span.piece.scale)
            above = np.greater(bits, span.limit, out=scratch("above", bits.size, bool))
            plain = is_plain(operator, span) and piece.latent.dtype == wide
            if plain and np.count_nonzero(above) > DENSE * w.size:
                _write_dense(w, bits, span, operator, flat_bits(piece.out))
                continue
            index = np.flatnonzero(above)
            kept = index, w.take(index)
        sparse.setdefault(id(span), []).append((piece, *kept))
    for same in sparse.values():
        span, dtype = same[0][0].span, same[0][0].latent.dtype
        chosen = np.concatenate([w for _, _, w in same])
        if is_plain(operator, span) and dtype == wide:
            u = plain_values(chosen, span.tau.numpy(), operator).view(INTEGER[chosen.dtype])
        else:
            u = flat_bits(kept_values(torch.from_numpy(chosen), span.tau, operator, dtype))
        end = 0
        for piece, index, w in same:
            target, start, end = flat_bits(piece.out), end, end + w.size
            target.fill(0)
            target[index] = u[start:end]


def _write_dense(
    w: np.ndarray, bits: np.ndarray, span: Span, operator: Operator, out: np.ndarray
) -> None:
    """Write effective weights, computing those of pruned weights too.

    Args:
        w: the weights.
        bits: of their scores; overwritten.
        span: that prunes them.
        operator: one that `is_plain` knows.
        out: memory for their effective weights, as integers.
    """
    limit, tau = bits.dtype.type(span.limit), span.tau.numpy()
    for a in range(0, w.size, SLICE):
        part = slice(a, a + SLICE)
        u = plain_values(w[part], tau, operator).view(bits.dtype)
        mask = np.subtract(limit, bits[part], out=bits[part])
        mask >>= 8 * bits.itemsize - 1  # all bits are set if the score is above the limit
        np.bitwise_and(mask, u, out=out[part])


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
