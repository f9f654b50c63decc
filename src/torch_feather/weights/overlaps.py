"""Overlaps of ranges and spans: weights in a CPU's cache that one comparison prunes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..selection.cpu import magnitude_bits
from ..threads import scratch
from .candidates import Candidates, choose, covering
from .latent import LatentWeights
from .ranges import known_candidates, ranges
from .scores import score_dtype
from .spans import Span, overlaps


class Overlap(NamedTuple):
    """The overlap of a range and a span.

    Example:
        >>> import torch
        >>> from torch_feather.weights.spans import Piece
        >>> span = Span(Piece(torch.ones(2), 0), 3, torch.tensor(0.5))
        >>> overlaps_of(LatentWeights([torch.ones(2)]), [span])[0][0].start
        0
    """

    span: Span
    number: int
    """Position of the span among all spans."""
    start: int
    """First weight in the range."""
    stop: int
    candidates: Candidates | None
    """Those of the range that hold all kept weights, if the overlap is all of it."""

    @property
    def threshold(self) -> float:
        """The magnitude up to which weights are pruned; 0 if none are."""
        return float(self.span.tau) if self.span.limit >= 0 else 0.0


def kept_mask(own: Sequence[Overlap], w: np.ndarray) -> np.ndarray:
    """Return the mask of the kept weights of a range, in memory of this thread.

    Args:
        own: the overlaps of the range.
        w: its weights, flat.

    Example:
        >>> import torch
        >>> from torch_feather.weights.spans import Piece
        >>> span = Span(Piece(torch.ones(2), 0), 0x3F800000, torch.tensor(1.0))
        >>> kept_mask([Overlap(span, 0, 0, 2, None)], np.float32([1.0, -2.0]))
        array([False,  True])
    """
    mask = scratch("kept", w.size, bool)
    for overlap in own:
        inside = slice(overlap.start, overlap.stop)
        bits = magnitude_bits(w[inside], overlap.span.piece.scale)
        np.greater(bits, overlap.span.limit, out=mask[inside])
    return mask


def kept_weights(own: Sequence[Overlap], w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the kept weights of a range, uint16, and these weights.

    Args:
        own: the overlaps of the range.
        w: its weights, flat.

    Example:
        >>> import torch
        >>> from torch_feather.weights.spans import Piece
        >>> span = Span(Piece(torch.ones(2), 0), 0x3F800000, torch.tensor(1.0))
        >>> kept_weights([Overlap(span, 0, 0, 2, None)], np.float32([1.0, -2.0]))
        (array([1], dtype=uint16), array([-2.], dtype=float32))
    """
    candidates, span = own[0].candidates, own[0].span
    if candidates is None:
        mask = kept_mask(own, w)
        return choose(w, mask, int(np.count_nonzero(mask)))
    values = candidates.of(w)
    inside = magnitude_bits(values, span.piece.scale) > span.limit
    return candidates.at[inside], values[inside]


def overlaps_of(weights: LatentWeights, every: Sequence[Span]) -> list[list[Overlap]]:
    """Return the overlaps of each of the `ranges`.

    Args:
        weights: the latent weights, on a CPU.
        every: all spans, in the order of the weights.

    Example:
        >>> import torch
        >>> from torch_feather.weights.spans import Piece
        >>> weights = LatentWeights([torch.ones(2), torch.ones(3)])
        >>> one = Span(Piece(weights.flats[0], 0), 3, torch.tensor(0.5))
        >>> [[overlap.stop for overlap in own] for own in overlaps_of(weights, [one])]
        [[2], [3]]
    """
    found = ranges(weights)
    range_of, span_of, starts, sizes = overlaps(found, every)
    scales = [1.0 if span.piece.scale is None else span.piece.scale for span in every]
    known = covering(
        known_candidates(weights),
        range_of.tolist(),
        np.array([span.limit for span in every])[span_of],
        np.array(scales, score_dtype(weights))[span_of],
    )
    first = starts - found.local[range_of]
    whole = sizes == found.size[range_of]
    result: list[list[Overlap]] = [[] for _ in found.size]
    columns = (x.tolist() for x in (range_of, span_of, first, sizes, whole))
    for j, k, a, size, alone, above in zip(*columns, known, strict=True):
        result[j].append(Overlap(every[k], k, a, a + size, above if alone else None))
    return result
