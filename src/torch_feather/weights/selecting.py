"""Cutoffs through the latent weights, on one process or over shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import devices
from ..selection import Cutoff, select, select_sharded
from ..selection.cpu import select_scores
from ..selection.device import select_magnitudes
from ..selection.float_bits import wide
from .exchange import bracket_of
from .latent import LatentWeights
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
    fill = weights.magnitudes if scales is None else partial(_scores, weights, scales)
    if weights.shards is None:
        return select(fill, k)
    return _select_sharded(weights, [fill()], k.unsqueeze(0), [(0, weights.size)])[0]


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
        scores = [weights.magnitudes(*span) for span in weights.spans]
        return _select_sharded(weights, scores, counts, weights.spans)
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


def _scores(weights: LatentWeights, scales: Sequence[Tensor]) -> Tensor:
    """Return |w| times the scale of its tensor, flat."""
    out = weights.magnitudes()
    ranges = [out[start:stop] for start, stop in weights.local_spans]
    torch._foreach_mul_(ranges, list(scales))
    return out


def _select_sharded(
    weights: LatentWeights,
    scores: list[Tensor],
    counts: Tensor,
    spans: Sequence[tuple[int, int]],
) -> list[Cutoff]:
    """Return cutoffs through the scores of several spans, each of entire weight tensors."""
    assert weights.shards is not None
    first, fillers = [weights.local_range(*span)[0] for span in spans], [0] * len(spans)
    for counted, (a, b), (start, stop) in zip(
        weights.shards.counted, weights.spans, weights.local_spans, strict=True
    ):
        if not counted:  # another process counts this copy; NaN ranks above all pruned scores
            j = next(j for j, span in enumerate(spans) if span[0] <= a and b <= span[1])
            scores[j][start - first[j] : stop - first[j]] = torch.nan
            fillers[j] += stop - start
    cutoffs = select_sharded(
        scores,
        counts,
        sizes=[stop - start for start, stop in spans],
        total=weights.shards.sum,
        local_positions=partial(_local_positions, weights, tuple(spans)),
        fillers=fillers if any(fillers) else None,
    )
    return [c._replace(last=c.last + a) for c, a in zip(cutoffs, first, strict=True)]


def _local_positions(
    weights: LatentWeights, spans: tuple[tuple[int, int], ...], index: Tensor
) -> Tensor:
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
