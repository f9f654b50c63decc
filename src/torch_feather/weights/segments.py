"""Segments: ranges of the latent weights that share one cutoff."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..selection import Cutoff
from .latent import LatentWeights


class Segment(NamedTuple):
    """The weights [start, stop) in flat order, pruned by one cutoff through their scores.

    The bounds are global and are bounds of weight tensors. The cutoff's `last` is an index among
    the local weights (see `LatentWeights`).
    """

    start: int
    stop: int
    cutoff: Cutoff
    scale: Tensor | None = None
    """Scores are |w| times this (0-dimensional; infinite: never pruned); None for |w| itself."""

    def pruned(self, magnitudes: Tensor, offset: int) -> Tensor:
        """Return the mask of pruned weights.

        Args:
            magnitudes: |w| of some local weights, flat.
            offset: local flat index of the first of them.
        """
        scores = magnitudes if self.scale is None else magnitudes * self.scale
        return self.cutoff.pruned(scores, offset)

    @property
    def threshold(self) -> Tensor:
        """tau as a magnitude, 0-dimensional: kept weights are larger, in spite of rounding."""
        if self.scale is None:
            return self.cutoff.threshold
        tau = self.cutoff.threshold / self.scale
        # Rounding guard: tau * scale must not exceed the cutoff, or a kept weight would fall below.
        above = tau * self.scale > self.cutoff.threshold
        return torch.where(above, torch.nextafter(tau, torch.zeros_like(tau)), tau)


def position_of(weights: LatentWeights, segments: Sequence[Segment], i: int) -> int:
    """Return the position in `segments` of the segment that holds weight tensor i."""
    start = weights.spans[i][0]
    return next(j for j, s in enumerate(segments) if s.start <= start < s.stop)


def segment_of(weights: LatentWeights, segments: Sequence[Segment], i: int) -> Segment:
    """Return the segment that holds weight tensor i."""
    return segments[position_of(weights, segments, i)]


def first_with_cutoff(segments: Sequence[Segment]) -> tuple[int, ...]:
    """Return for each segment the position of the first one with the same cutoff object."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(segment.cutoff), j) for j, segment in enumerate(segments))
