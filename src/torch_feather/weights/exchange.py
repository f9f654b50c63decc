"""Copies between parameters and latent weights.

After a step on a CPU, the weights that the next selections need are collected while the copy is in
the cache, so that the selections do not read all weights again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import devices
from ..selection.bracket import Bracket
from ..selection.cpu import SMALL, Collected
from ..threads import for_each
from . import triton_passes
from .compiled import copy_memory, copy_weights
from .groups import Group, groups
from .latent import LatentWeights, flat_bits
from .scores import WeightScores

Span = tuple[int, int]
"""A range of local weights."""


def bracket_of(weights: LatentWeights, start: int, stop: int, scaled: bool = False) -> Bracket:
    """Return the bracket for a selection from a range; it is kept from step to step.

    The next copy collects what such a selection needs, unless the scores are scaled.

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
    bracket: Bracket = weights.constant(("bracket", start, stop, scaled), lambda _: Bracket())
    if not scaled:
        _expected(weights)[start, stop] = bracket
    return bracket


def _expected(weights: LatentWeights) -> dict[Span, Bracket]:
    """Return the brackets of the selections since the last copy, by range."""
    found: dict[Span, Bracket] = weights.constant("expected selections", lambda _: {})
    return found


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
    weights.collected = {}
    if triton_passes.copy(weights, positions, sources, reads=True):
        return
    targets = [weights.views[i] for i in positions]
    if devices.synchronizes(weights.device) or not _copies_all(weights, positions, sources):
        copy_weights(targets, sources)
        return
    brackets = _known_brackets(weights)
    memory = dict(zip(positions, map(flat_bits, sources), strict=True))
    held = {i: flat_bits(weights.views[i]) for i in positions}
    scores = WeightScores(weights, 0, weights.size)
    spans_of = [[span for span in brackets if span[0] <= start and stop <= span[1]]
                for start, stop in weights.local_spans]
    bounds = {
        span: tuple(scores.as_integer(bound) for bound in bracket.bounds or ())
        for span, bracket in brackets.items()
    }

    def read(group: Group) -> list[tuple[Span, int, np.ndarray]]:
        near = []
        for i, a, b in group.ranges:
            target, source = held[i][a:b], memory[i][a:b]
            first, spans = weights.local_spans[i][0], spans_of[i]
            if not spans:
                copy_memory(target, source)
            for j, span in enumerate(spans):
                copied = source if j == 0 else None
                near.append((span, *scores.collect(first + a, first + b, *bounds[span], copied)))
        return near

    found: dict[Span, list[tuple[int, np.ndarray]]] = {span: [] for span in brackets}
    for part in for_each(read, groups(weights)):
        for span, count, near in part:
            found[span].append((count, near))
    increment_version(weights.flats)
    versions = [flat._version for flat in weights.flats]
    for span, bracket in brackets.items():
        below = sum(count for count, _ in found[span])
        near = np.concatenate([near for _, near in found[span]])
        assert bracket.bounds is not None
        weights.collected[span] = Collected(bracket.bounds, below, near, versions)


def write_latent(
    weights: LatentWeights, positions: Sequence[int], targets: Sequence[Tensor]
) -> None:
    """Copy latent weights into parameters.

    Args:
        weights: the latent weights.
        positions: positions of the weight tensors to copy.
        targets: a local tensor for each position, in its layout, to write.

    Example:
        >>> import torch
        >>> target = torch.zeros(2)
        >>> write_latent(LatentWeights([torch.ones(2)]), [0], [target])
        >>> target
        tensor([1., 1.])
    """
    if not triton_passes.copy(weights, positions, targets, reads=False):
        copy_weights(targets, [weights.views[i] for i in positions])


def _known_brackets(weights: LatentWeights) -> dict[Span, Bracket]:
    """Return the brackets of the selections that are expected next, and forget them."""
    expected = _expected(weights)
    known = {
        (start, stop): bracket
        for (start, stop), bracket in expected.items()
        if bracket.bounds is not None and stop - start >= SMALL
    }
    expected.clear()
    return known


def _copies_all(
    weights: LatentWeights, positions: Sequence[int], sources: Sequence[Tensor]
) -> bool:
    """Return whether all weights are copied unchanged."""
    if len(positions) < len(weights.views) or weights.shards is not None:
        return False
    return all(
        source.dtype == view.dtype and source.stride() == view.stride()
        for source, view in zip(sources, (weights.views[i] for i in positions), strict=True)
    )
