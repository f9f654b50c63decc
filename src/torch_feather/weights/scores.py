"""The magnitudes of latent weights as scores for a selection, read block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from ..selection.cpu import INTEGER, Near, Scores, between, magnitude_bits
from ..threads import for_each, scratch
from . import compiled
from .candidates import Candidates, covering
from .latent import LatentWeights
from .ranges import RANGE, arrays, known_candidates, ranges, rows_of, wide_array
from .spans import Piece

RUN = 16
"""Most ranges whose candidates are joined."""


def pieces(
    weights: LatentWeights, start: int, stop: int, scales: Sequence[Tensor] | None = None
) -> list[Piece]:
    """Return the local weights start to stop in as few pieces as possible.

    Args:
        weights: the latent weights.
        start: first local weight.
        stop: end of the range.
        scales: a scale for each weight tensor, 0-dimensional each; None for 1.

    Example:
        >>> weights = LatentWeights([torch.ones(2), torch.ones(3)])
        >>> [piece.values.numel() for piece in pieces(weights, 0, 5, torch.ones(2).unbind())]
        [2, 3]
    """
    found = []
    for part in weights.parts:
        spans: list[tuple[int, int, np.floating | None]] = [(part.start, part.stop, None)]
        if scales is not None:
            inside = [
                (a, b, np.float64(scale.item()) if weights.wide == torch.float64
                 else np.float32(scale.item()))
                for (a, b), scale in zip(weights.local_spans, scales, strict=True)
                if part.start <= a and b <= part.stop
            ]  # fmt: skip
            spans = sorted(inside, key=lambda span: span[0])
        for first, end, scale in spans:
            a, b = max(first, start), min(end, stop)
            if a < b:
                found.append(Piece(part.flat[a - part.start : b - part.start], a, scale))
    return found


class WeightScores(Scores):
    """|w| of local weights as scores, or |w| times the scale of each weight tensor.

    Args:
        weights: the latent weights, on the CPU. They are only read.
        start: first local weight.
        stop: end of the range.
        scales: a scale for each weight tensor, 0-dimensional each; None for 1.

    Example:
        >>> scores = WeightScores(LatentWeights([torch.tensor([1.0, -2.0])]), 0, 2)
        >>> scores.block(0, 2).view(np.float32).tolist()
        [1.0, 2.0]
    """

    def __init__(
        self,
        weights: LatentWeights,
        start: int,
        stop: int,
        scales: Sequence[Tensor] | None = None,
    ):
        self._start, self._wide, self.size = start, weights.wide, stop - start
        self.dtype = score_dtype(weights)
        self._make_pieces = partial(pieces, weights, start, stop, scales)
        self._collected = weights.collected.pop((start, stop), None) if scales is None else None
        self._weights, self._scales = weights, scales

    @cached_property
    def _pieces(self) -> list[Piece]:
        return self._make_pieces()

    def _inside(self, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
        """Yield the pieces that hold scores start to stop, and the range in each."""
        first, end = start + self._start, stop + self._start
        for piece in self._pieces:
            a = max(first - piece.start, 0)
            b = min(end - piece.start, piece.values.numel())
            if a < b:
                yield piece, a, b

    def block(self, start: int, stop: int) -> np.ndarray:
        parts, first = list(self._inside(start, stop)), start + self._start
        if len(parts) == 1:
            [(piece, a, b)] = parts
            return magnitude_bits(as_array(piece.values[a:b], self._wide), piece.scale)
        joined = np.empty(stop - start, INTEGER[self.dtype])
        for piece, a, b in parts:
            at = piece.start + a - first
            values = as_array(piece.values[a:b], self._wide)
            joined[at : at + b - a] = magnitude_bits(values, piece.scale)
        return joined

    def collect_all(self, low: float, high: float) -> tuple[int, Near]:
        found, self._collected = self._collected, None  # its memory is free after the first use
        # If the weights were changed since then, it is out of date.
        if (
            found is not None
            and found.bounds == (low, high)
            and found.versions == [flat._version for flat in self._weights.flats]
        ):
            return found.below, found.near
        return self._collect_compiled(low, high) or self._collect_ranges(low, high)

    def _collect_ranges(self, low: float, high: float) -> tuple[int, Near]:
        """Return what `collect_all` does, from candidates alone where they are known."""
        weights, least, most = self._weights, self.as_integer(low), self.as_integer(high)
        every, latent = ranges(weights), arrays(weights, weights.views)
        dtypes = [weights.views[i].dtype for i in every.position.tolist()]
        rows = rows_of(weights, (self._start, self._start + self.size))
        scales = np.ones(len(dtypes), self.dtype)
        if self._scales is not None:
            scales[:] = torch.stack(list(self._scales)).numpy()[every.position]
        inside = range(rows.start, rows.stop)
        limits = np.full(len(inside), least)
        found = covering(known_candidates(weights), inside, limits, scales[rows])
        known = dict(zip(inside, found, strict=True))

        def collect(part: slice) -> tuple[int, np.ndarray, np.ndarray]:
            values = []
            for j in range(part.start, part.stop):
                candidates = known[j]
                if candidates is None or candidates.values is None:
                    w = wide_array(latent[j], dtypes[j], weights.wide)
                    values.append(w if candidates is None else candidates.of(w))
                else:
                    values.append(candidates.values)
            sizes = [w.size for w in values]
            ends = np.cumsum(sizes)
            if len(values) == 1:
                bits = magnitude_bits(values[0], scales[part.start])
            else:
                # Calls of NumPy on the few candidates of one range take longer than their work.
                joined = np.concatenate(values, out=scratch("scores", int(ends[-1]), self.dtype))
                bits = magnitude_bits(joined, np.repeat(scales[part], sizes))
            count, inside = between(bits, least, most)
            below = int(every.size[part].sum()) - bits.size + count
            near = inside.nonzero()[0]
            return below, bits.take(near), np.searchsorted(near, ends)

        parts = for_each(collect, _runs(rows, known))
        start = every.local[rows] - self._start
        offsets = np.cumsum([0, *(near.size for _, near, _ in parts)])
        ends = [end + offset for (*_, end), offset in zip(parts, offsets[:-1], strict=True)]
        near = np.concatenate([near for _, near, _ in parts])
        counted = Near(start, start + every.size[rows], np.concatenate(ends), near)
        return sum(count for count, *_ in parts), counted

    def _collect_compiled(self, low: float, high: float) -> tuple[int, Near] | None:
        """Return what `collect_all` does, by compiled loops; None if there are none."""
        if compiled.kernels() is None:
            return None
        if any(piece.values.dtype != torch.float32 for piece in self._pieces):
            return None
        parts = [
            (piece, a, min(RANGE, piece.values.numel() - a))
            for piece in self._pieces
            for a in range(0, piece.values.numel(), RANGE)
        ]
        rows = compiled.empty_table(len(parts))
        rows["parameter"] = [piece.values.data_ptr() + 4 * a for piece, a, _ in parts]
        rows["size"] = [n for _, _, n in parts]
        rows["scale"] = [1.0 if piece.scale is None else piece.scale for piece, _, _ in parts]
        rows["low"], rows["high"] = self.as_integer(low), self.as_integer(high)
        near = compiled.collect(rows, copies=False)
        if near is None:
            return None
        starts = np.array([piece.start + a - self._start for piece, a, _ in parts])
        return int(rows["below"].sum()), Near(starts, starts + rows["size"], rows["end"], near)

    def sample(self, step: int) -> np.ndarray:
        found, first = [], 0
        for piece in self._pieces:
            values = np.abs(as_array(piece.values[first::step], self._wide))
            with np.errstate(all="ignore"):
                found.append(values if piece.scale is None else values * piece.scale)
            first = (first - piece.values.numel()) % step
        return np.concatenate(found) if found else np.empty(0, self.dtype)


def _runs(rows: slice, known: Mapping[int, Candidates | None]) -> list[slice]:
    """Return ranges in runs: up to `RUN` neighbours with known candidates, or one without."""
    runs: list[slice] = []
    for j in range(rows.start, rows.stop):
        last = runs[-1] if runs else slice(j, j)
        joins = known[j] is not None and last.stop > last.start and known[last.start] is not None
        if joins and last.stop - last.start < RUN:
            runs[-1] = slice(last.start, j + 1)
        else:
            runs.append(slice(j, j + 1))
    return runs


def score_dtype(weights: LatentWeights) -> np.dtype:
    """Return the NumPy type of the magnitudes of weights.

    Example:
        >>> score_dtype(LatentWeights([torch.ones(2, dtype=torch.bfloat16)]))
        dtype('float32')
    """
    return np.dtype(np.float64 if weights.wide == torch.float64 else np.float32)


def as_array(values: Tensor, wide: torch.dtype) -> np.ndarray:
    """Return values as a NumPy array of type `wide`, in their own memory if they have this type.

    Example:
        >>> as_array(torch.ones(2, dtype=torch.bfloat16), torch.float32)
        array([1., 1.], dtype=float32)
    """
    return values.to(wide).numpy()
