"""Cutoffs through the latent weights, on one process or over shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .. import devices
from ..selection import Cutoff, select, select_sharded
from ..selection.cpu import select_scores
from ..selection.device import select_magnitudes
from ..selection.float_bits import wide
from ..selection.sharded import Blocks
from .exchange import bracket_of
from .latent import LatentWeights
from .ranges import Span
from .scores import WeightScores


def select_weights(
    weights: LatentWeights, k: Tensor, scales: Sequence[Tensor] | None = None
) -> Cutoff:
    """Return the cutoff that prunes exactly the k smallest |w|.

    Args:
        weights: the latent weights.
        k: how many to prune, 0-dimensional int64.
        scales: rank |w| times the scale of its tensor instead, 0-dimensional each.

    Example:
        >>> weights = LatentWeights([torch.tensor([3.0, -1.0, 2.0])])
        >>> float(select_weights(weights, torch.tensor(2)).value)
        2.0
    """
    if weights.shards is None and not devices.synchronizes(weights.device):
        return _select_cpu(weights, int(k), 0, weights.size, scales)
    if weights.shards is None and scales is None:
        return _select_device(weights, 0, weights.size, k)
    if weights.shards is None:
        return select(partial(_scores, weights, scales), k)
    return _select_sharded(weights, k.unsqueeze(0), [(0, weights.size)], scales)[0]


def select_each(weights: LatentWeights, counts: Tensor) -> list[Cutoff]:
    """Return for each weight tensor the cutoff that prunes its `counts` smallest |w|.

    Args:
        weights: the latent weights.
        counts: int64 of shape (tensors,).

    Example:
        >>> weights = LatentWeights([torch.tensor([3.0, -1.0]), torch.tensor([2.0, 4.0])])
        >>> [float(cutoff.value) for cutoff in select_each(weights, torch.tensor([1, 2]))]
        [1.0, 4.0]
    """
    if weights.shards is not None:
        return _select_sharded(weights, counts, weights.spans)
    cutoffs, on_device = [], devices.synchronizes(weights.device)
    ks = counts.unbind() if on_device else counts.tolist()
    for (start, stop), k in zip(weights.spans, ks, strict=True):
        if on_device:
            cutoff = _select_device(weights, start, stop, k)
        else:
            cutoff = _select_cpu(weights, k, start, stop)
        cutoffs.append(cutoff._replace(last=cutoff.last + start))
    return cutoffs


def _select_cpu(
    weights: LatentWeights, k: int, start: int, stop: int, scales: Sequence[Tensor] | None = None
) -> Cutoff:
    """Return the cutoff of the k smallest scores of a range; the last one narrows the search."""
    bracket = bracket_of(weights, start, stop, scales is not None)
    return select_scores(WeightScores(weights, start, stop, scales), k, bracket)


def _select_device(weights: LatentWeights, start: int, stop: int, k: Tensor) -> Cutoff:
    """Return the cutoff of the k smallest |w| of a range; without a copy if it has one type."""
    for part in weights.parts:
        if part.start <= start and stop <= part.stop and wide(part.flat.dtype) == weights.wide:
            return select_magnitudes(part.flat[start - part.start : stop - part.start], k)
    return select(partial(weights.magnitudes, start, stop), k)


def _scores(
    weights: LatentWeights,
    scales: Sequence[Tensor] | None,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Return the scores of a range of global bounds, flat; with scales, the range is everything."""
    out = weights.magnitudes(start, stop)
    if scales is not None:
        torch._foreach_mul_([out[a:b] for a, b in weights.local_spans], list(scales))
    return out


class _Counted:
    """Scores of which some are NaN, which ranks above all pruned scores: others count these copies.

    Args:
        scores: all scores.
        others: ranges that another process counts.
    """

    def __init__(self, scores: Blocks, others: Sequence[Span]):
        self.size, self.dtype = scores.size, scores.dtype
        self._scores, self._others = scores, others

    def block(self, start: int, stop: int) -> np.ndarray:
        """Return the bits of scores start to stop."""
        bits = self._scores.block(start, stop)
        for a, b in self._others:
            bits[max(a - start, 0) : max(b - start, 0)] = np.iinfo(bits.dtype).max
        return bits


def _select_sharded(
    weights: LatentWeights,
    counts: Tensor,
    spans: Sequence[Span],
    scales: Sequence[Tensor] | None = None,
) -> list[Cutoff]:
    """Return cutoffs through the scores of several spans, each of entire weight tensors.

    Args:
        weights: the latent weights.
        counts: how many to prune of each span.
        spans: global bounds.
        scales: as for `select_weights`.
    """
    assert weights.shards is not None
    on_device, local = (
        devices.synchronizes(weights.device),
        [weights.local_range(*s) for s in spans],
    )
    others: list[list[Span]] = [[] for _ in spans]
    for counted, (a, b), (start, stop) in zip(
        weights.shards.counted, weights.spans, weights.local_spans, strict=True
    ):
        if not counted:  # another process counts this copy
            j = next(j for j, span in enumerate(spans) if span[0] <= a and b <= span[1])
            others[j].append((start - local[j][0], stop - local[j][0]))
    scores: list[Tensor | Blocks] = []
    for span, (first, end), copies in zip(spans, local, others, strict=True):
        if on_device:
            filled = _scores(weights, scales, *span)
            for a, b in copies:
                filled[a:b] = torch.nan
            scores.append(filled)
        else:
            own = WeightScores(weights, first, end, scales)
            scores.append(_Counted(own, copies) if copies else own)
    fillers = [sum(b - a for a, b in copies) for copies in others]
    cutoffs = select_sharded(
        scores,
        counts,
        sizes=[stop - start for start, stop in spans],
        total=weights.shards.sum,
        local_positions=partial(_local_positions, weights, tuple(spans)),
        fillers=fillers if any(fillers) else None,
    )
    return [c._replace(last=c.last + a) for c, (a, _) in zip(cutoffs, local, strict=True)]


def _local_positions(weights: LatentWeights, spans: tuple[Span, ...], index: Tensor) -> Tensor:
    """Return how many local weights of each span precede its global indices, (spans, n)."""
    assert weights.shards is not None

    def make(_: LatentWeights) -> tuple[Tensor, Tensor]:
        holders = [
            next(j for j, span in enumerate(spans) if span[0] <= a and b <= span[1])
            for a, b in weights.spans
        ]
        offsets = [a - spans[j][0] for j, (a, _) in zip(holders, weights.spans, strict=True)]
        return torch.tensor(holders).to(weights.device), torch.tensor(offsets).to(weights.device)

    holder, offset = weights.constant(("local positions", spans), make)
    inside = (index[holder] - offset[:, None]).clamp_min(0).minimum(weights.sizes[:, None])
    return torch.zeros_like(index).index_add_(0, holder, weights.shards.below(inside))
