"""The passes over weights on a CPU with NumPy, range by range in the cache.

`compiled.py` has the same passes as compiled loops, with the same bits, and is preferred.
`passes.py` has the form for other devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import roots
from ..operators import Operator, Power
from ..selection.cpu import magnitude_bits
from ..threads import for_each, scratch
from . import compiled
from .candidates import choose
from .checksum import checksum_of_rows, may_be_nonfinite
from .exchange import thresholds_of
from .kept import kept_values
from .latent import LatentWeights, flat_bits
from .overlaps import Overlap, overlaps_of
from .ranges import arrays, groups, ranges, wide_array
from .rows import NO_FACTORS, RowFactors
from .segments import Segment
from .spans import Span, is_plain, keeps_all, spans
from .sums import Recorded, Sums, versions

DENSE = 0.25
"""Kept fraction of a range above which all its weights are computed, not the kept ones alone."""
SAMPLE = 61
"""Every so many weights are counted to estimate this fraction."""


def write_effective(
    weights: LatentWeights,
    segments: Sequence[Segment],
    operator: Operator | Sequence[Operator],  # one, or one for each segment
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
    size, recorded, nonfinite = len(found.size), isinstance(out, Recorded), None
    checksums = np.empty(size, np.int64) if recorded else None
    if isinstance(operator, Operator):
        sums = None if factors else checksums
        nonfinite = compiled.write_effective(weights, every, operator, out, sums)
        operator = [operator] * len(segments)
    flat = arrays(weights, out) if nonfinite is None or factors else []
    rows = _row_factors(weights, factors)

    def finish(j: int) -> None:
        if checksums is not None:
            checksums[j] = checksum_of_rows(flat[j])

    if nonfinite is None:
        pieces = _pieces(weights, every, operator, flat, rows)
        if recorded:
            thresholds = [min(piece.overlap.threshold for piece in own) for own in pieces]
            thresholds_of(weights).update(np.array(thresholds))

        def write(group: slice) -> bool:
            inside = range(group.start, group.stop)
            found = _write([piece for j in inside for piece in pieces[j]], weights.wide)
            for j in inside:
                finish(j)
            return found

        nonfinite = any(for_each(write, groups(weights)))
    elif factors:

        def multiply(j: int) -> bool:
            dtype = out[found.position[j]].dtype
            if j in rows:
                rows[j].multiply(torch.from_numpy(flat[j]).view(dtype))
            finish(j)
            return checksums is not None and may_be_nonfinite(flat[j], dtype)

        nonfinite = any(for_each(multiply, range(size)))
    torch.autograd.graph.increment_version(list(out))
    if isinstance(out, Recorded) and checksums is not None:
        out.sums = Sums(versions(out), checksums, nonfinite)


def write_each(
    weights: LatentWeights,
    function: Callable[..., None],
    out: Sequence[Tensor],
    *more: Sequence[Tensor],
) -> None:
    """Write effective weights by an elementwise function; arguments as for `passes.write_each`.

    Example:
        >>> weights, u = LatentWeights([torch.tensor([0.5, 2.0])]), torch.empty(2)
        >>> write_each(weights, lambda w, out: out.copy_(w), [u])
        >>> u
        tensor([0.5000, 2.0000])
    """
    found, recorded = ranges(weights), isinstance(out, Recorded)
    size = len(found.size)
    checksums = np.empty(size, np.int64)
    flats = [arrays(weights, weights.views), *map(found.of, more), arrays(weights, out)]
    dtypes = [[tensor.dtype for tensor in tensors] for tensors in (weights.views, *more, out)]

    def write(j: int) -> bool:
        i, bits = found.position[j], flats[-1][j]
        pairs = zip(flats, dtypes, strict=True)
        function(*(torch.from_numpy(flat[j]).view(dtype[i]) for flat, dtype in pairs))
        if recorded:
            checksums[j] = checksum_of_rows(bits)
        return recorded and may_be_nonfinite(bits, out[i].dtype)

    nonfinite = any(for_each(write, range(size)))
    torch.autograd.graph.increment_version(list(out))
    if isinstance(out, Recorded):
        out.sums = Sums(versions(out), checksums, nonfinite)


def _row_factors(weights: LatentWeights, factors: Mapping[int, Tensor]) -> dict[int, RowFactors]:
    """Return the factors of each of the `ranges` that has some."""
    if not factors:
        return {}
    found, widths = ranges(weights), [view[:1].numel() for view in weights.views]
    pairs = enumerate(zip(found.position.tolist(), found.start.tolist(), strict=True))
    return {j: RowFactors(factors[i], widths[i], a) for j, (i, a) in pairs if i in factors}


class PieceOfSpan(NamedTuple):
    """The overlap of a range and a span, as integers of the width of its values.

    Example:
        >>> from torch_feather.weights.spans import Piece
        >>> span, bits = Span(Piece(torch.ones(2), 0), 3, torch.tensor(0.5)), np.zeros(2, np.int32)
        >>> PieceOfSpan(Overlap(span, 0, 0, 2, None), Power(), torch.float32, bits, bits).span.limit
        3
    """

    overlap: Overlap
    operator: Operator
    """Gives the values of kept weights."""
    dtype: torch.dtype
    latent: np.ndarray
    out: np.ndarray
    plain: bool = False
    """Whether `plain_values` computes the operator."""
    rows: RowFactors | None = None
    """By which the effective weights are multiplied."""

    @property
    def span(self) -> Span:
        """The span."""
        return self.overlap.span

    def multiply(self) -> None:
        """Multiply the effective weights by the factors of their rows."""
        if self.rows is not None:
            self.rows.multiply(torch.from_numpy(self.out).view(self.dtype))


def _pieces(
    weights: LatentWeights,
    every: Sequence[Span],
    operators: Sequence[Operator],
    out: Sequence[np.ndarray],
    rows: Mapping[int, RowFactors],
) -> list[list[PieceOfSpan]]:
    """Return the pieces of each of the `ranges`.

    Args:
        weights: the latent weights.
        every: all spans.
        operators: gives the values of kept weights of each segment.
        out: memory to write for each range.
        rows: factors for some of the ranges.
    """
    dtypes = [span.piece.values.dtype for span in every]
    own_operator = [operators[span.segment] for span in every]
    triples = zip(every, dtypes, own_operator, strict=True)
    plain = [dtype == weights.wide and is_plain(one, span) for span, dtype, one in triples]
    latent = arrays(weights, weights.views)
    pieces: list[list[PieceOfSpan]] = []
    for j, own in enumerate(overlaps_of(weights, every)):
        pieces.append([])
        for overlap in own:
            k, a, b, factors = overlap.number, overlap.start, overlap.stop, rows.get(j)
            if factors is not None:
                factors = factors._replace(start=factors.start + a)
            parts = latent[j][a:b], out[j][a:b]
            pieces[j].append(
                PieceOfSpan(overlap, own_operator[k], dtypes[k], *parts, plain[k], factors)
            )
    return pieces


def _write(pieces: Sequence[PieceOfSpan], wide: torch.dtype) -> bool:
    """Write effective weights: those of dense pieces at once.

    Those of sparse pieces are computed together: most operations on them are shorter than a call of
    NumPy.

    Returns:
        Whether a value may be NaN or infinite.
    """
    nonfinite = False
    sparse: dict[int, list[tuple[PieceOfSpan, np.ndarray, np.ndarray]]] = {}  # by span
    for piece in pieces:
        if keeps_all(piece.operator, piece.span):
            np.copyto(piece.out, piece.latent)
            piece.multiply()
            nonfinite |= may_be_nonfinite(piece.out, piece.dtype)
            continue
        w = wide_array(piece.latent, piece.dtype, wide)
        known = piece.overlap.candidates
        if known is not None:
            index, chosen = known.at, known.of(w)
        else:
            bits = magnitude_bits(w, piece.span.piece.scale)
            sample = bits[::SAMPLE]
            kept = int(np.count_nonzero(sample > piece.span.limit))
            if piece.plain and kept > DENSE * sample.size:
                _write_dense(w, bits, piece.span, piece.operator, piece.out)
                piece.multiply()
                nonfinite |= may_be_nonfinite(piece.out, piece.dtype)
                continue
            above = np.greater(bits, piece.span.limit, out=scratch("above", bits.size, bool))
            count = int(np.count_nonzero(above))
            index, chosen = choose(w, above, count)
        sparse.setdefault(id(piece.span), []).append((piece, index, chosen))
    for same in sparse.values():
        u = _sparse_values([piece for piece, _, _ in same], [w for *_, w in same])
        end = 0
        for piece, index, w in same:
            start, end = end, end + w.size
            values = u[start:end]
            if piece.rows is not None and piece.dtype == wide:
                with np.errstate(all="ignore"):
                    values.view(w.dtype)[:] *= piece.rows.of(index)
            piece.out.fill(0)
            piece.out[index.astype(np.intp)] = values
            if piece.dtype != wide:
                piece.multiply()
        nonfinite |= may_be_nonfinite(u, same[0][0].dtype)
    return nonfinite


def _sparse_values(pieces: Sequence[PieceOfSpan], chosen: Sequence[np.ndarray]) -> np.ndarray:
    """Return the effective values, as integers, of the weights of one span that may be kept.

    Args:
        pieces: of the span.
        chosen: the weights of each piece that may be kept.
    """
    span, dtype, w = pieces[0].span, pieces[0].dtype, np.concatenate(chosen)
    operator = pieces[0].operator
    if pieces[0].plain:
        u = plain_values(w, span.tau.numpy(), operator).view(pieces[0].out.dtype)
    else:
        u = flat_bits(kept_values(torch.from_numpy(w), span.tau, operator, dtype))
    if any(piece.overlap.candidates is not None for piece in pieces):  # some of these may be pruned
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
