"""Segments: ranges of the latent weights with one cutoff."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import devices
from ..selection import Cutoff
from .latent import LatentWeights


class Segment(NamedTuple):
    """The weights [start, stop) in flat order, pruned by one cutoff through their scores.

    The bounds are global and are bounds of weight tensors. The cutoff's `last` is an index among
    the local weights (see `LatentWeights`).

    Example:
        >>> cutoff = Cutoff(torch.tensor(2.0), torch.tensor(2), torch.tensor(2.0))
        >>> segment = Segment(0, 3, cutoff, scale=torch.tensor(2.0))  # prunes 2 |w| <= 2
        >>> segment.pruned(torch.tensor([0.5, 1.0, 1.5]), 0).tolist()
        [True, True, False]
        >>> float(segment.threshold)
        1.0
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
        if not devices.synchronizes(self.scale.device):
            return thresholds([self])[0]
        # Rounding guard: tau * scale must not exceed the cutoff, or a kept weight would fall below.
        tau = self.cutoff.threshold / self.scale
        above = tau * self.scale > self.cutoff.threshold
        return torch.where(above, torch.nextafter(tau, torch.zeros_like(tau)), tau)


def thresholds(segments: Sequence[Segment]) -> list[Tensor]:
    """Return `Segment.threshold` of segments on a CPU.

    Example:
        >>> cutoff = Cutoff(torch.tensor(2.0), torch.tensor(2), torch.tensor(2.0))
        >>> thresholds([Segment(0, 3, cutoff, torch.tensor(2.0)), Segment(3, 4, cutoff)])
        [tensor(1.), tensor(2.)]
    """
    scaled = [j for j, segment in enumerate(segments) if segment.scale is not None]
    found = [segment.cutoff.threshold for segment in segments]
    if scaled:  # on few numbers, an operation of NumPy takes a fraction of the time
        cutoff = np.array([found[j].numpy()[()] for j in scaled])
        scale = np.array([segments[j].scale.numpy()[()] for j in scaled])  # type: ignore[union-attr]
        with np.errstate(all="ignore"):
            tau = cutoff / scale
            np.nextafter(tau, 0, out=tau, where=tau * scale > cutoff)  # see `Segment.threshold`
        for j, own in zip(scaled, torch.from_numpy(tau).unbind(), strict=True):
            found[j] = own
    return found


def position_of(weights: LatentWeights, segments: Sequence[Segment], i: int) -> int:
    """Return the position in `segments` of the segment that holds weight tensor i.

    Example:
        >>> weights = LatentWeights([torch.ones(2), torch.ones(3)])
        >>> cutoff = Cutoff(torch.tensor(0.5), torch.tensor(4), torch.tensor(0.5))
        >>> position_of(weights, [Segment(0, 2, cutoff), Segment(2, 5, cutoff)], 1)
        1
    """
    start = weights.spans[i][0]
    if i < len(segments) and segments[i].start <= start < segments[i].stop:
        return i  # there is often one for each tensor
    return next(j for j, s in enumerate(segments) if s.start <= start < s.stop)


def segment_of(weights: LatentWeights, segments: Sequence[Segment], i: int) -> Segment:
    """Return the segment that holds weight tensor i.

    Example:
        >>> weights = LatentWeights([torch.ones(2), torch.ones(3)])
        >>> cutoff = Cutoff(torch.tensor(0.5), torch.tensor(4), torch.tensor(0.5))
        >>> segment_of(weights, [Segment(0, 5, cutoff)], 1).stop
        5
    """
    return segments[position_of(weights, segments, i)]


def first_with_cutoff(segments: Sequence[Segment]) -> tuple[int, ...]:
    """Return for each segment the position of the first one with the same cutoff object.

    Example:
        >>> one, other = (Cutoff(*torch.tensor([x, 1.0, x])) for x in (0.5, 0.25))
        >>> first_with_cutoff([Segment(0, 2, one), Segment(2, 5, other), Segment(5, 9, one)])
        (0, 1, 0)
    """
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(segment.cutoff), j) for j, segment in enumerate(segments))
