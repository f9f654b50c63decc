"""Spans: local weights of a CPU that one comparison of integers prunes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..operators import Operator, Power
from ..selection.cpu import as_integer
from .latent import LatentWeights
from .ranges import Ranges
from .segments import Segment, thresholds

TINY = 2.0**-100
"""Effective weights of float32 weights above a threshold of this size cannot round to 0."""


class Piece(NamedTuple):
    """Neighbouring local weights of one type and one scale.

    Example:
        >>> Piece(torch.ones(2), 3).start
        3
    """

    values: Tensor
    """The weights, flat."""
    start: int
    """Index of the first among the local weights."""
    scale: float | np.floating | None = None
    """Scores are |w| times this; None for |w| itself."""


class Span(NamedTuple):
    """Neighbouring local weights that one comparison prunes.

    Example:
        >>> Span(Piece(torch.ones(2), 0), 3, torch.tensor(0.5)).limit
        3
    """

    piece: Piece
    limit: int
    """Weights are pruned if the bits of their score are at most this."""
    tau: Tensor
    """Threshold of the operator, 0-dimensional."""
    segment: int = 0
    """Position of its segment among those given."""


def spans(weights: LatentWeights, segments: Sequence[Segment]) -> Iterator[Span]:
    """Yield all local weights in spans.

    Args:
        weights: the latent weights, on the CPU.
        segments: cover all weights once.

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([1.0, 1.0, 2.0])])
        >>> cutoff = Cutoff(torch.tensor(1.0), torch.tensor(0), torch.tensor(0.9))
        >>> [span.piece.values.numel() for span in spans(weights, [Segment(0, 3, cutoff)])]
        [1, 2]
    """
    wide = np.dtype(np.float64 if weights.wide == torch.float64 else np.float32)
    bounds: dict[int, tuple[int, int]] = {}  # limit and last index of each cutoff
    for number, (segment, tau) in enumerate(zip(segments, thresholds(segments), strict=True)):
        first, end = weights.local_range(segment.start, segment.stop)
        if id(segment.cutoff) not in bounds:
            value, last = segment.cutoff.value.item(), int(segment.cutoff.last)
            bounds[id(segment.cutoff)] = as_integer(value, wide) if value >= 0 else -1, last
        limit, last = bounds[id(segment.cutoff)]
        scale = None if segment.scale is None else wide.type(segment.scale.item())
        for part in weights.parts:
            a, b = max(first, part.start), min(end, part.stop)
            # Scores equal to the cutoff are pruned up to `last`, so the comparison changes there.
            middle = min(max(last + 1, a), b)
            for start, stop, bound in ((a, middle, limit), (middle, b, max(limit, 0) - 1)):
                if start < stop:
                    inside = part.flat[start - part.start : stop - part.start]
                    yield Span(Piece(inside, start, scale), bound, tau, number)


def is_plain(operator: Operator, span: Span) -> bool:
    """Return whether the passes on a CPU compute this operator on a span themselves.

    Example:
        >>> piece, tau = Piece(torch.ones(2), 0), torch.tensor(0.1)
        >>> is_plain(Power(3.0), Span(piece, 3, tau)), is_plain(Power(2.5), Span(piece, 3, tau))
        (True, False)
    """
    if operator.is_identity or keeps_all(operator, span):
        return True
    if type(operator) is not Power or operator.p not in (1.0, 2.0, 3.0):
        return False
    return span.tau.dtype == torch.float32 and (span.tau.item() == 0 or span.tau.item() >= TINY)


def keeps_all(operator: Operator, span: Span) -> bool:
    """Return whether the effective weights of a span are its latent weights.

    Example:
        >>> keeps_all(Power(3.0), Span(Piece(torch.ones(2), 0), -1, torch.tensor(0.0)))
        True
    """
    return span.limit < 0 and (operator.is_identity or operator.identity_at_zero)


def overlaps(
    found: Ranges, every: Sequence[Span]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the overlaps of ranges and spans in the order of the weights.

    Args:
        found: the ranges of all local weights.
        every: all spans, in the order of the weights.

    Returns:
        The number of the range of each overlap, that of its span, its first local weight and its
        size.

    Example:
        >>> from torch_feather.weights.ranges import ranges
        >>> weights = LatentWeights([torch.ones(2), torch.ones(3)])
        >>> one = [Span(Piece(weights.flats[0], 0), 3, torch.tensor(0.5))]
        >>> [x.tolist() for x in overlaps(ranges(weights), one)]
        [[0, 1], [0, 0], [0, 2], [2, 3]]
    """
    starts = np.array([span.piece.start for span in every], np.int64)  # there may be none
    cuts = np.union1d(found.local, starts)
    range_of = np.searchsorted(found.local, cuts, "right") - 1
    ends = np.minimum(np.append(cuts[1:], np.inf), (found.local + found.size)[range_of])
    span_of = np.searchsorted(starts, cuts, "right") - 1
    return range_of, span_of, cuts, ends.astype(np.int64) - cuts
