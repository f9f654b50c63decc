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
from ..selection.cpu import SMALL, Collected, Near
from ..threads import for_each
from . import compiled, triton_passes
from .candidates import Candidates, collect
from .latent import LatentWeights, copy_all
from .ranges import ranges, wide_array
from .scores import WeightScores
from .sums import Sums, copy_unmodified

Span = tuple[int, int]
"""A range of local weights."""
NOTHING = -1
"""Both bounds of ranges of which nothing is collected."""


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
    weights.collected, weights.candidates = {}, {}
    if triton_passes.copy(weights, positions, sources, reads=True):
        return
    targets = [weights.views[i] for i in positions]
    if devices.synchronizes(weights.device) or not _copies_all(weights, positions, sources):
        copy_all(targets, sources)
        return
    brackets, found = _known_brackets(weights), ranges(weights)
    rows_of = {  # the ranges of weights that each selection reads
        span: slice(*np.searchsorted(found.local, span).tolist()) for span in brackets
    }
    scores = WeightScores(weights, 0, weights.size)
    low, high = (np.full(len(found.size), NOTHING, np.int64) for _ in range(2))
    for span, bracket in brackets.items():
        low[rows_of[span]], high[rows_of[span]] = map(scores.as_integer, bracket.bounds or ())
    by_position = dict(zip(positions, sources, strict=True))
    parameters = [by_position[i] for i in range(len(positions))]
    collected = _read(weights, parameters, low, high)
    increment_version(weights.flats)
    if collected is None:
        return
    below, near = collected
    versions = weights.candidate_versions = [flat._version for flat in weights.flats]
    for (start, stop), rows in rows_of.items():
        parts = [
            Near(a - start, a - start + n, magnitudes)
            for a, n, magnitudes in zip(
                found.local[rows].tolist(), found.size[rows].tolist(), near[rows], strict=True
            )
        ]
        bounds = brackets[start, stop].bounds
        assert bounds is not None
        weights.collected[start, stop] = Collected(bounds, int(below[rows].sum()), parts, versions)


def _read(
    weights: LatentWeights, parameters: Sequence[Tensor], low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]] | None:
    """Copy parameters into latent weights, and collect the magnitudes of each of the `ranges`.

    Args:
        weights: the latent weights.
        parameters: a local tensor for each weight tensor.
        low: bound for each range, as an integer.
        high: another one.

    Returns:
        How many are at most `low`, and those strictly between the bounds; None if they are too many
        to hold.
    """
    rows = compiled.table(weights, parameters)
    if rows is not None:
        rows["low"], rows["high"] = low, high
        near = compiled.collect(rows, copies=True)
        return None if near is None else (rows["below"], near)
    found = ranges(weights)

    dtypes = [view.dtype for view in weights.views]

    def read(task: tuple[int, np.ndarray, np.ndarray]) -> tuple[int, np.ndarray, Candidates | None]:
        j, latent, parameter = task
        np.copyto(latent, parameter)
        if low[j] == NOTHING:
            return 0, np.empty(0, np.int64), None
        w = wide_array(latent, dtypes[found.position[j]], weights.wide)
        return collect(w, int(low[j]), int(high[j]))

    tasks = zip(range(len(low)), found.of(weights.views), found.of(parameters), strict=True)
    parts = for_each(read, list(tasks))
    weights.candidates = {j: part[2] for j, part in enumerate(parts) if part[2] is not None}
    return np.array([count for count, _, _ in parts]), [near for _, near, _ in parts]


def write_latent(
    weights: LatentWeights,
    positions: Sequence[int],
    parameters: Sequence[Tensor],
    sums: Sums | None = None,
) -> list[int]:
    """Copy latent weights into parameters, except into those that other code modified.

    Args:
        weights: the latent weights.
        positions: positions of the weight tensors to copy.
        parameters: a local tensor for each weight tensor, in its layout, to write.
        sums: of the values that they were given; None to copy in any case.

    Returns:
        The positions of parameters that were modified, including those that are not copied.

    Example:
        >>> import torch
        >>> target = torch.zeros(2)
        >>> write_latent(LatentWeights([torch.ones(2)]), [0], [target])
        []
        >>> target
        tensor([1., 1.])
    """
    if sums is not None:
        return copy_unmodified(weights, positions, parameters, sums)
    targets = [parameters[i] for i in positions]
    if not triton_passes.copy(weights, positions, targets, reads=False):
        copy_all(targets, [weights.views[i] for i in positions])
    return []


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
