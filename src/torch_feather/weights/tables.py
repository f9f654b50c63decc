"""Tables of pointers and lengths, by which one launch passes over many tensors.

Each row is the work of one program: a range of the latent weights of one type, and where each of
the tensors that belong to it begins, in bytes from the first tensor of its list. So a table depends
on the layout of the memory alone, and most steps upload nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .latent import LatentWeights, Part
from .segments import Segment, position_of

BLOCK = 4096
"""Weights per program."""
COLUMNS = 3
"""Columns in front of the offsets: first weight in its part, length, segment."""
MOST_TABLES = 32
"""Tables that are kept at most, unless a graph that was captured reads them."""


class Table(NamedTuple):
    """The work of a launch on one part of the latent weights.

    Example:
        >>> weights = LatentWeights([torch.ones(2), torch.ones(3)])
        >>> [table] = tables(weights, [0, 1], [weights.views])
        >>> table.rows.tolist(), table.bases[0] == weights.views[0].data_ptr()
        ([[0, 2, 0, 0], [2, 3, 0, 8]], True)
    """

    part: Part
    rows: Tensor
    """int64 of shape (programs, COLUMNS + lists)."""
    bases: list[int]
    """Address of the first tensor of each list."""


def tables(
    weights: LatentWeights,
    positions: Sequence[int],
    lists: Sequence[Sequence[Tensor]],
    segments: Sequence[Segment] = (),
) -> list[Table] | None:
    """Return a table for each part of the latent weights that has work.

    Args:
        weights: the latent weights.
        positions: positions of weight tensors.
        lists: lists of local tensors, one per position.
        segments: the segments, to number them; none for 0.

    Returns:
        The tables, or None if a tensor has another type, layout or device than its weights, or
        the upload of a new table would be captured in a CUDA graph.

    Example:
        >>> weights = LatentWeights([torch.ones(2, 3)])
        >>> tables(weights, [0], [[torch.ones(3, 2).t()]]) is None  # another layout
        True
    """
    found = []
    for part, members in _by_part(weights, positions):
        views = [weights.views[positions[m]] for m in members]
        chosen = [[one[m] for m in members] for one in lists]
        if not all(
            _alike(one, view) for each in chosen for one, view in zip(each, views, strict=True)
        ):
            return None
        addresses = [[one.data_ptr() for one in each] for each in chosen]
        bases = [each[0] for each in addresses]
        offsets = tuple(
            tuple(a - base for a in each) for each, base in zip(addresses, bases, strict=True)
        )
        bounds = tuple((segment.start, segment.stop) for segment in segments)
        held = tuple(positions[m] for m in members)
        rows = _rows(weights, part, (held, bounds, offsets), segments)
        if rows is None:
            return None
        found.append(Table(part, rows, bases))
    return found


def _by_part(
    weights: LatentWeights, positions: Sequence[int]
) -> Iterator[tuple[Part, tuple[int, ...]]]:
    """Yield each part, and which of the positions it holds, without tensors that are empty."""

    def make(_: LatentWeights) -> list[tuple[int, tuple[int, ...]]]:
        numbers = {id(part): number for number, part in enumerate(weights.parts)}
        members: dict[int, list[int]] = {}
        for m, i in enumerate(positions):
            if weights.views[i].numel():
                members.setdefault(numbers[id(weights.part_of(i))], []).append(m)
        return [(number, tuple(which)) for number, which in members.items()]

    for number, which in weights.constant(("parts of", *positions), make):
        yield weights.parts[number], which


def _alike(one: Tensor, view: Tensor) -> bool:
    return one.dtype == view.dtype and one.stride() == view.stride() and one.device == view.device


Key = tuple[tuple[int, ...], tuple[tuple[int, int], ...], tuple[tuple[int, ...], ...]]


class _Kept(dict[Key, Tensor]):
    """The rows of tables; `pinned` are those that a captured graph may read."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[Key] = set()


def _rows(
    weights: LatentWeights, part: Part, key: Key, segments: Sequence[Segment]
) -> Tensor | None:
    """Return the rows of a table; None if they cannot be uploaded now."""
    kept: _Kept = weights.constant("tables", lambda _: _Kept())
    capturing = weights.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key not in kept:
        if capturing:
            return None
        for old in [one for one in kept if one not in kept.pinned][: len(kept) - MOST_TABLES + 1]:
            del kept[old]
        rows = torch.from_numpy(_computed(weights, part, key, segments))
        if weights.device.type == "cuda":  # memory that is not pinned would synchronize the host
            rows = rows.pin_memory()
        kept[key] = rows.to(weights.device, non_blocking=True)
    if capturing:
        kept.pinned.add(key)
    return kept[key]


def _computed(
    weights: LatentWeights, part: Part, key: Key, segments: Sequence[Segment]
) -> np.ndarray:
    """Return the rows of a table on the host."""
    held, _, offsets = key
    pieces = []
    for m, i in enumerate(held):
        size, start = weights.views[i].numel(), weights.local_spans[i][0] - part.start
        within = np.arange(0, size, BLOCK)
        number = position_of(weights, segments, i) if segments else 0
        columns = [start + within, np.minimum(BLOCK, size - within), np.full_like(within, number)]
        columns += [each[m] + within * part.flat.element_size() for each in offsets]
        pieces.append(np.stack(columns, axis=1))
    return np.concatenate(pieces).astype(np.int64)
