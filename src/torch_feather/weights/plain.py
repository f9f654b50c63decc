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
from ..selection.cpu import magnitude_bits
from ..threads import for_each, scratch
from . import compiled
from .candidates import Candidates, choose, covering, known_candidates
from .checksum import column_sums, may_be_nonfinite
from .exchange import thresholds_of
from .kept import kept_values
from .latent import LatentWeights, flat_bits, flat_of
from .ranges import COLUMNS, arrays, groups, ranges, wide_array
from .rows import NO_FACTORS, multiply_rows
from .scores import score_dtype
from .segments import Segment
from .spans import Span, is_plain, keeps_all, overlaps, spans
from .sums import Recorded, Sums, versions

DENSE = 0.25
"""Kept fraction of a range above which all its weights are computed, not the kept ones alone."""
SAMPLE = 61
"""Every so many weights are counted to estimate this fraction."""


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
    size, recorded = len(found.size), isinstance(out, Recorded)
    columns = np.empty((size, COLUMNS), np.int64) if recorded else None
    nonfinite = compiled.write_effective(
        weights, every, operator, out, None if factors else columns
    )
    flat = arrays(weights, out) if nonfinite is None or factors else []

    def finish(j: int, check: bool = True) -> bool:
        """Multiply and sum range j; return whether a value may be NaN or infinite."""
        i = int(found.position[j])
        if i in factors:
            width = out[i].numel() // len(factors[i])
            part = flat_of(out[i])[found.start[j] :][: found.size[j]]
            multiply_rows(part, int(found.start[j]), width, factors[i])
        if columns is None:
            return False
        column_sums(flat[j], columns[j])
        return check and may_be_nonfinite(flat[j], out[i].dtype)

    if nonfinite is None:
        pieces = _pieces(weights, every, operator, flat)
        if recorded:
            thresholds = [min(piece.limit for piece in own) for own in pieces]
            thresholds_of(weights).update(np.array(thresholds))

        def write(group: slice) -> bool:
            inside = range(group.start, group.stop)
            found = _write([piece for j in inside for piece in pieces[j]], operator, weights.wide)
            return any([finish(j, check=bool(factors)) for j in inside]) or found

        nonfinite = any(for_each(write, groups(weights)))
    elif factors:
        nonfinite = any(for_each(finish, range(size)))
    torch.autograd.graph.increment_version(list(out))
    if isinstance(out, Recorded) and columns is not None:
        out.sums = Sums(versions(out), columns, nonfinite)


class PieceOfSpan(NamedTuple):
    """The overlap of a range and a span, as integers of the width of its values.

    Example:
        >>> from torch_feather.weights.spans import Piece
        >>> span, bits = Span(Piece(torch.ones(2), 0), 3, torch.tensor(0.5)), np.zeros(2, np.int32)
        >>> PieceOfSpan(span, torch.float32, bits, bits).span.limit
        3
    """

    span: Span
    dtype: torch.dtype
    latent: np.ndarray
    out: np.ndarray
    plain: bool = True
    """Whether `plain_values` computes the operator."""
    candidates: Candidates | None = None
    """Those of the range, if the piece is all of it."""

    @property
    def limit(self) -> float:
        """The magnitude up to which weights are pruned; 0 if none are."""
        return float(self.span.tau) if self.span.limit >= 0 else 0.0


def _pieces(
    weights: LatentWeights, every: Sequence[Span], operator: Operator, out: Sequence[np.ndarray]
) -> list[list[PieceOfSpan]]:
    """Return the pieces of each of the `ranges`.

    Args:
        weights: the latent weights.
        every: all spans.
        operator: gives the values of kept weights.
        out: memory to write for each range.
    """
    found, candidates = ranges(weights), known_candidates(weights)
    dtypes = [span.piece.values.dtype for span in every]
    pairs = zip(every, dtypes, strict=True)
    plain = [dtype == weights.wide and is_plain(operator, span) for span, dtype in pairs]
    latent = arrays(weights, weights.views)
    pieces: list[list[PieceOfSpan]] = [[] for _ in out]
    range_of, span_of, starts, sizes = overlaps(found, every)
    limits = np.array([span.limit for span in every])[span_of]
    scales = [1.0 if span.piece.scale is None else span.piece.scale for span in every]
    scales_of = np.array(scales, score_dtype(weights))[span_of]
    known = covering(candidates, range_of.tolist(), limits, scales_of)
    first = starts - found.local[range_of]
    rows = zip(*(x.tolist() for x in (range_of, span_of, first, sizes)), known, strict=True)
    for j, k, a, size, above in rows:
        inside, whole = slice(a, a + size), size == out[j].size
        pieces[j].append(
            PieceOfSpan(
                every[k], dtypes[k], latent[j][inside], out[j][inside], plain[k],
                above if whole else None,
            )
        )  # fmt: skip
    return pieces


def _write(pieces: Sequence[PieceOfSpan], operator: Operator, wide: torch.dtype) -> bool:
    """Write effective weights: those of dense pieces at once.

    Those of sparse pieces are computed together: most operations on them are shorter than a call of
    NumPy.

    Returns:
        Whether a value may be NaN or infinite.
    """
    nonfinite = False
    sparse: dict[int, list[tuple[PieceOfSpan, np.ndarray, np.ndarray]]] = {}  # by span
    for piece in pieces:
        if keeps_all(operator, piece.span):
            np.copyto(piece.out, piece.latent)
            nonfinite |= may_be_nonfinite(piece.out, piece.dtype)
            continue
        w = wide_array(piece.latent, piece.dtype, wide)
        known = piece.candidates
        if known is not None:
            index, chosen = known.at, known.of(w)
        else:
            bits = magnitude_bits(w, piece.span.piece.scale)
            sample = bits[::SAMPLE]
            kept = int(np.count_nonzero(sample > piece.span.limit))
            if piece.plain and kept > DENSE * sample.size:
                _write_dense(w, bits, piece.span, operator, piece.out)
                nonfinite |= may_be_nonfinite(piece.out, piece.dtype)
                continue
            above = np.greater(bits, piece.span.limit, out=scratch("above", bits.size, bool))
            count = int(np.count_nonzero(above))
            index, chosen = choose(w, above, count)
        sparse.setdefault(id(piece.span), []).append((piece, index, chosen))
    for same in sparse.values():
        u = _sparse_values([piece for piece, _, _ in same], [w for *_, w in same], operator)
        nonfinite |= may_be_nonfinite(u, same[0][0].dtype)
        end = 0
        for piece, index, w in same:
            start, end = end, end + w.size
            piece.out.fill(0)
            piece.out[index.astype(np.intp)] = u[start:end]
    return nonfinite


def _sparse_values(
    pieces: Sequence[PieceOfSpan],
    chosen: Sequence[np.ndarray],
    operator: Operator,
) -> np.ndarray:
    """Return the effective values, as integers, of the weights of one span that may be kept.

    Args:
        pieces: of the span.
        chosen: the weights of each piece that may be kept.
        operator: gives the values of kept weights.
    """
    span, dtype, w = pieces[0].span, pieces[0].dtype, np.concatenate(chosen)
    if pieces[0].plain:
        u = plain_values(w, span.tau.numpy(), operator).view(pieces[0].out.dtype)
    else:
        u = flat_bits(kept_values(torch.from_numpy(w), span.tau, operator, dtype))
    if any(piece.candidates is not None for piece in pieces):  # some of these may be pruned
        u[(magnitude_bits(w, span.piece.scale) <= span.limit).nonzero()[0]] = 0
    return u


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
    known = bits.view(w.dtype) if span.piece.scale is None else None
    u = plain_values(w, span.tau.numpy(), operator, known, out.view(w.dtype)).view(bits.dtype)
    mask = np.subtract(bits.dtype.type(span.limit), bits, out=bits)
    mask >>= 8 * bits.itemsize - 1  # all bits are set if the score is above the limit
    np.bitwise_and(mask, u, out=out)


def plain_values(
    w: np.ndarray,
    tau: np.ndarray,
    operator: Operator,
    magnitudes: np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Return the effective values of kept weights, with the bits of the operator.

    Args:
        w: the weights, flat. Values that are not kept give any number or NaN.
        tau: threshold of the operator, 0-dimensional.
        operator: one that `is_plain` knows.
        magnitudes: |w|, if they are known.
        out: memory for the values; None for memory of this thread.

    Returns:
        The argument `w`, or `out`.

    Example:
        >>> plain_values(np.float32([2.0]), np.float32(0.5), Power(1.0))
        array([1.5], dtype=float32)
    """
    if operator.is_identity or tau == 0:
        return w
    assert isinstance(operator, Power)
    if out is None:
        out = scratch("values", w.size, w.dtype)
    with np.errstate(all="ignore"):
        if operator.p == 1.0:
            return np.subtract(w, np.copysign(tau, w, out=out), out=out)
        if magnitudes is None:
            magnitudes = np.abs(w, out=out)
        ratio = np.divide(tau, magnitudes, out=out)
        rest = np.multiply(ratio, ratio, out=scratch("rest", w.size, w.dtype))
        if operator.p == 3.0:
            rest *= ratio
        np.subtract(np.float32(1), rest, out=rest)  # of a kept weight, at least 3 * 2^-24
        root = np.sqrt(rest, out=out) if operator.p == 2.0 else _cube_root(rest, out)
        return np.multiply(root, w, out=out)


def _cube_root(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Write the cube root of float32 numbers in (0, 1] into `y`, as in `roots.cube_root`."""
    number = np.float32
    bits, t = y.view(np.uint32), scratch("cube", x.size, number)
    np.floor_divide(x.view(np.uint32), np.uint32(3), out=bits)
    bits += np.uint32(roots.START)
    np.multiply(y, y, out=t)
    t *= y
    np.divide(x, t, out=t)
    t += number(2)
    np.divide(number(3), t, out=t)
    y *= np.subtract(number(2), t, out=t)
    np.multiply(y, y, out=t)
    np.divide(x, t, out=t)
    t -= y
    t *= number(roots.THIRD)
    y += t
    return y
