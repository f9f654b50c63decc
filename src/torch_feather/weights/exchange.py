"""Copies between parameters and latent weights.

After a step on a CPU, the weights that the next selection needs are collected while the copy is in
the cache, so that the selection does not read all weights again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import devices
from ..selection.bracket import Bracket
from ..selection.cpu import Collected
from ..threads import for_each
from .compiled import copy_memory, copy_weights
from .groups import Group, groups
from .latent import LatentWeights
from .plain import flat_bits
from .scores import WeightScores


def bracket_of(weights: LatentWeights, start: int, stop: int, scaled: bool = False) -> Bracket:
    """Return the bracket for selections from a range; it is kept from step to step.

    Args:
        weights: the latent weights.
        start: first local weight.
        stop: end of the range.
        scaled: whether the scores are scaled.

    Example:
        >>> import torch
        >>> weights = LatentWeights([torch.ones(2)])
        >>> bracket_of(weights, 0, 2) is bracket_of(weights, 0, 2)
        True
    """
    return weights.constant(("bracket", start, stop, scaled), lambda _: Bracket())


def read_latent(
    weights: LatentWeights, positions: Sequence[int], sources: Sequence[Tensor]
) -> None:
    """Copy parameters into latent weights.

    Args:
        weights: the latent weights, to write.
        positions: positions of the weight tensors to copy.
        sources: a local tensor for each position, in its layout.

    Example:
        >>> import torch
        >>> weights = LatentWeights([torch.zeros(2)])
        >>> read_latent(weights, [0], [torch.ones(2)])
        >>> weights.views[0]
        tensor([1., 1.])
    """
    weights.collected = None
    targets = [weights.views[i] for i in positions]
    if devices.synchronizes(weights.device) or not _collects(weights, positions, sources):
        copy_weights(targets, sources)
        return
    bracket, size = bracket_of(weights, 0, weights.size), weights.size
    assert bracket.bounds is not None
    memory = dict(zip(positions, map(flat_bits, sources), strict=True))
    held = {i: flat_bits(weights.views[i]) for i in positions}
    scores = WeightScores(weights, 0, size)
    low, high = (scores.as_integer(bound) for bound in bracket.bounds)

    def read(group: Group) -> tuple[int, np.ndarray]:
        for i, a, b in group.ranges:
            copy_memory(held[i][a:b], memory[i][a:b])
        return scores.collect(group.start, group.stop, low, high)

    found = for_each(read, groups(weights))
    increment_version(weights.flats)
    weights.collected = Collected(
        bracket.bounds,
        sum(count for count, _ in found),
        np.concatenate([near for _, near in found]),
        [flat._version for flat in weights.flats],
    )


def _collects(weights: LatentWeights, positions: Sequence[int], sources: Sequence[Tensor]) -> bool:
    """Return whether all weights are copied unchanged, and one selection from all is expected."""
    if len(positions) < len(weights.views) or weights.shards is not None:
        return False
    if bracket_of(weights, 0, weights.size).bounds is None:
        return False
    return all(
        source.dtype == view.dtype and source.stride() == view.stride()
        for source, view in zip(sources, (weights.views[i] for i in positions), strict=True)
    )
