"""Copies between parameters and latent weights.

After a step on a CPU, the weights that the next selections need are collected while the copy is in
the cache, so that the selections do not read all weights again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import devices
from ..selection.bracket import Bracket, Brackets
from ..selection.cpu import INTEGER, SMALL, Collected, Near, as_integer
from ..threads import for_each
from . import compiled, triton_passes
from .candidates import Candidates, collect
from .latent import LatentWeights, copy_all
from .ranges import Span, arrays, ranges, rows_of, wide_array
from .scores import score_dtype
from .sums import Sums, copy_unmodified
from .updates import PendingUpdate

NOTHING = -1
"""Both bounds of ranges of which nothing is collected."""


def bracket_of(weights: LatentWeights, start: int, stop: int, scaled: bool = False) -> Bracket:
    """Return the bracket for a selection from a range; it is kept from step to step.

    The next copy collects what such a selection needs; if the scores are scaled, it only finds
    candidates.

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
    _expected(weights)[start, stop, scaled] = bracket
    return bracket


def _expected(weights: LatentWeights) -> dict[tuple[int, int, bool], Bracket]:
    """Return the brackets of the selections since the last copy, by start, stop and `scaled`."""
    found: dict[tuple[int, int, bool], Bracket] = weights.constant(
        "expected selections", lambda _: {}
    )
    return found


def thresholds_of(weights: LatentWeights) -> Brackets:
    """Return brackets of the next threshold of each of the `ranges`, kept from step to step.

    The next copy finds candidates with them, in ranges of which it does not know a selection.

    Example:
        >>> import torch
        >>> thresholds_of(LatentWeights([torch.ones(2)])).value
        array([0.])
    """
    found: Brackets = weights.constant("thresholds", lambda w: Brackets(len(ranges(w).size)))
    return found


def read_latent(
    weights: LatentWeights,
    positions: Sequence[int],
    sources: Sequence[Tensor],
    pending: PendingUpdate | None = None,
) -> None:
    """Copy parameters into latent weights, and update these. On a CPU, both are one pass.

    Args:
        weights: the latent weights, to write.
        positions: positions of the weight tensors to copy.
        sources: a local tensor for each position, in its layout.
        pending: the update; None for none.

    Example:
        >>> import torch
        >>> weights = LatentWeights([torch.zeros(2)])
        >>> read_latent(weights, [0], [torch.ones(2)])
        >>> weights.views[0]
        tensor([1., 1.])
    """
    weights.collected, weights.candidates = {}, {}
    if not triton_passes.copy(weights, positions, sources, reads=True):
        everything = len(positions) == len(weights.views) and weights.shards is None
        on_device = devices.synchronizes(weights.device)
        if everything and not on_device and _read_all(weights, positions, sources, pending):
            return
        copy_all([weights.views[i] for i in positions], sources)
    if pending is not None:
        pending.apply(weights, positions)


def _read_all(
    weights: LatentWeights,
    positions: Sequence[int],
    sources: Sequence[Tensor],
    pending: PendingUpdate | None,
) -> bool:
    """Copy and update all weights, and collect what the next selections need, on a CPU.

    Returns:
        False if nothing was copied, because a parameter has another type or layout.
    """
    parameters = list(sources)
    for i, source in zip(positions, sources, strict=True):
        parameters[i] = source
    table = compiled.table(weights, parameters)
    if table is None and not _same_layout(parameters, weights.views):
        return False
    found, dtype = ranges(weights), score_dtype(weights)
    bounds_of, width = _known_bounds(weights)
    expected = [(span, rows_of(weights, span), bounds) for span, bounds in bounds_of.items()]
    low, high = (np.full(len(found.size), NOTHING, np.int64) for _ in range(2))
    if table is None:
        bound = thresholds_of(weights).low(width).astype(dtype)
        low[bound > 0] = bound[bound > 0].view(INTEGER[dtype])
    for _, rows, bounds in expected:
        low[rows], high[rows] = (as_integer(bound, dtype) for bound in bounds)
    change = None if pending is None else pending.on_ranges(weights, positions)
    if table is None:
        collected: Found | None = _read_plain(weights, parameters, low, high, change)
    else:
        if change is not None:
            _copy_and_change(weights, parameters, change)
        collected = _read_compiled(table, low, high, copies=change is None)
    increment_version(weights.flats)
    if collected is None:
        return True
    below, end, near = collected
    versions = weights.candidate_versions = [flat._version for flat in weights.flats]
    for (start, stop), rows, bounds in expected:
        first = found.local[rows] - start
        before = int(end[rows.start - 1]) if rows.start else 0
        inside = near[before : end[rows.stop - 1]]
        of_span = Near(first, first + found.size[rows], end[rows] - before, inside)
        count = int(below[rows].sum())
        weights.collected[start, stop] = Collected(bounds, count, of_span, versions)
    return True


Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""How many magnitudes of each range are at most its lower bound, the end of those strictly between
its bounds, and all these."""


Change = Callable[[int], None]
"""Changes the latent weights of one of the `ranges`, given by its number."""


def _copy_and_change(weights: LatentWeights, parameters: Sequence[Tensor], change: Change) -> None:
    """Copy parameters into latent weights, and change these while they are in the cache."""
    latent, held = arrays(weights, weights.views), arrays(weights, parameters)

    def read(j: int) -> None:
        np.copyto(latent[j], held[j])
        change(j)

    for_each(read, range(len(latent)))


def _read_compiled(
    rows: np.ndarray, low: np.ndarray, high: np.ndarray, copies: bool
) -> Found | None:
    """Read as `_read_plain` by compiled loops; None if the magnitudes are too many to hold.

    Args:
        rows: a table.
        low: bound for each range, as an integer.
        high: another one.
        copies: whether to copy parameters; otherwise the latent weights are up to date.
    """
    rows["low"], rows["high"] = low, high
    if not copies:
        rows["parameter"], rows["scale"] = rows["latent"], 1.0
    near = compiled.collect(rows, copies)
    return None if near is None else (rows["below"], rows["end"], near)


def _read_plain(
    weights: LatentWeights,
    parameters: Sequence[Tensor],
    low: np.ndarray,
    high: np.ndarray,
    change: Change | None,
) -> Found:
    """Copy parameters into latent weights, and collect the magnitudes of each of the `ranges`.

    Args:
        weights: the latent weights.
        parameters: a local tensor for each weight tensor.
        low: bound for each range, as an integer.
        high: another one.
        change: of the latent weights, before magnitudes are collected; None for none.
    """
    found = ranges(weights)
    dtypes = [view.dtype for view in weights.views]

    def read(task: tuple[int, np.ndarray, np.ndarray]) -> tuple[int, np.ndarray, Candidates | None]:
        j, latent, parameter = task
        np.copyto(latent, parameter)
        if change is not None:
            change(j)
        if low[j] == NOTHING:
            return 0, np.empty(0, np.int64), None
        w = wide_array(latent, dtypes[found.position[j]], weights.wide)
        return collect(w, int(low[j]), int(high[j]))

    pairs = zip(arrays(weights, weights.views), arrays(weights, parameters), strict=True)
    parts = for_each(read, [(j, *pair) for j, pair in enumerate(pairs)])
    weights.candidates = {j: part[2] for j, part in enumerate(parts) if part[2] is not None}
    counts, near = [part[0] for part in parts], [part[1] for part in parts]
    end = np.cumsum([part.size for part in near])
    return np.array(counts), end, np.concatenate(near)


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


def _known_bounds(weights: LatentWeights) -> tuple[dict[Span, tuple[float, float]], float]:
    """Return the bounds of the selections that are expected next, and forget these.

    Returns:
        Bounds of magnitudes, and how far below the last thresholds candidates for scaled scores
        must reach, relatively.
    """
    bounds, width = {}, 0.0
    for (start, stop, scaled), bracket in _expected(weights).items():
        if scaled:
            width = max(width, 2 * bracket.width)  # the scales may change, too
        elif stop - start >= SMALL and bracket.bounds is not None:
            bounds[start, stop] = bracket.bounds
    _expected(weights).clear()
    return bounds, width


def _same_layout(sources: Sequence[Tensor], views: Sequence[Tensor]) -> bool:
    """Return whether tensors have the same types and strides."""
    pairs = zip(sources, views, strict=True)
    return all(a.dtype == b.dtype and a.stride() == b.stride() for a, b in pairs)
