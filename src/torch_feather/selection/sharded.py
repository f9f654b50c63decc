"""Selection over shards: every process counts its own scores, and all find the same cutoff.

The digits of the k-th score are found as in `device.py`, from the summed counts of all shards. Tied
scores are then ordered by their index in the full tensor, digit by digit too. Several selections
share their communication: one sum of up to 2048 counts per selection and digit. Counts below 2^31
are exchanged as 32-bit integers: 16 kB per selection of float32 scores, and 8 kB per 11 bits of an
index if scores are tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .. import devices
from .counting import descend
from .cpu import BLOCK, TensorScores
from .cutoff import Cutoff, cutoff_at
from .device import default_passes
from .float_bits import FLOAT_BITS, FloatBits

DIGIT = 11
"""Bits of an index found per pass."""


class Blocks(Protocol):
    """Scores that are computed block by block, as `selection.cpu.Scores`.

    Example:
        >>> scores: Blocks = TensorScores(torch.tensor([3.0, 1.0]))
        >>> scores.size
        2
    """

    size: int
    dtype: np.dtype

    def block(self, start: int, stop: int) -> np.ndarray:
        """Return the bits of scores start to stop, in memory that the next call may use again.

        The caller may overwrite it.
        """


def select_sharded(
    scores: Sequence[Tensor | Blocks],
    k: Tensor,
    *,
    sizes: Sequence[int],
    total: Callable[[Tensor], Tensor],
    local_positions: Callable[[Tensor], Tensor],
    fillers: Sequence[int] | None = None,
) -> list[Cutoff]:
    """Return the cutoffs that prune the k smallest scores, ordered by (score, global index).

    Args:
        scores: the local scores of each selection in global order: flat, contiguous tensors, or on
            a CPU blocks. NaN ranks above infinity: it may stand for a score counted elsewhere.
        k: int64 of shape (selections,).
        sizes: global number of scores of each selection.
        total: sums a tensor of counts over the processes, in place or not.
        local_positions: maps global indices to the number of local scores before each; int64 of
            shape (selections, n), both counted from 0 in each selection.
        fillers: how many of the local scores of each selection are NaN that stand for a score that
            another process counts; None for none.

    Returns:
        One cutoff per selection, the same on all processes except for `last`, which is an index
        among the local scores.

    Example:
        >>> cutoffs = select_sharded(  # one process, which holds all scores
        ...     [torch.tensor([3.0, 1.0, 2.0])],
        ...     torch.tensor([2]),
        ...     sizes=[3],
        ...     total=lambda counts: counts,
        ...     local_positions=lambda index: index,
        ... )
        >>> float(cutoffs[0].value)
        2.0
    """
    each = [(j, _counter(one)) for j, one in enumerate(scores)]
    bits = each[0][1].bits
    counter = torch.int32 if max(sizes) < 2**31 else torch.int64

    def exchange(counts: Tensor) -> Tensor:
        return total(counts.to(counter))

    extra = torch.tensor(fillers or [0] * len(scores), device=k.device)
    code = equal = torch.zeros_like(k)
    rank, shift = k, sum(bits.digits)
    for width in bits.digits:
        shift -= width
        counts = torch.stack([c.count_digits(code[j], shift, width) for j, c in each])
        if fillers:
            _leave_out(counts, extra, code, bits.infinity + 1, shift, width)
        code, rank, equal = descend(exchange(counts), rank, code, shift)
    tied = (equal > rank) & (code <= bits.infinity)  # NaN is never tied
    last = torch.tensor([c.size for _, c in each], device=k.device) - 1
    if devices.synchronizes(k.device) or bool(tied.any()):
        ties = [c.ties(code[j]) for j, c in each]
        index = _last_tie(ties, rank, max(sizes), exchange, local_positions)
        last = torch.where(tied, local_positions(index[:, None] + 1)[:, 0] - 1, last)
    return [cutoff_at(*fields, bits) for fields in zip(k, code, tied, last, strict=True)]


def _leave_out(
    counts: Tensor, fillers: Tensor, code: Tensor, nan: int, shift: int, width: int
) -> None:
    """Subtract the fillers, whose code is `nan`, from counts of a digit, in place."""
    known = shift + width
    column = counts[:, (nan >> shift) % (1 << width)]
    column -= torch.where((code >> known) == (nan >> known), fillers, 0)


def _last_tie(
    ties: Sequence[Callable[[Tensor], Tensor]],
    rank: Tensor,
    size: int,
    total: Callable[[Tensor], Tensor],
    local_positions: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the global index of tie number `rank` (from 1) of each selection."""
    index, shift = torch.zeros_like(rank), max(1, (size - 1).bit_length())
    while shift > 0:
        width = min(DIGIT, shift)
        shift -= width
        edges = torch.arange((1 << width) + 1, device=rank.device) << shift
        local_edges = local_positions(index[:, None] + edges)
        counts = [before(edge).diff() for before, edge in zip(ties, local_edges, strict=True)]
        index, rank, _ = descend(total(torch.stack(counts)), rank, index, shift)
    return index


class _Counter(Protocol):
    """Counts the local scores of one selection."""

    size: int
    bits: FloatBits

    def count_digits(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        """Count codes by one digit, as `Passes.count_digits`."""

    def ties(self, code: Tensor) -> Callable[[Tensor], Tensor]:
        """Return a function that counts the scores with this code before given positions."""


def _counter(scores: Tensor | Blocks) -> _Counter:
    """Return the fastest counter on the device of the scores."""
    if not isinstance(scores, Tensor):
        return _Narrowing(scores)
    on_device = devices.synchronizes(scores.device)
    return _OnDevice(scores) if on_device else _Narrowing(TensorScores(scores))


class _OnDevice:
    """Counts without a read of the host."""

    def __init__(self, scores: Tensor) -> None:
        self.size, self.bits = scores.numel(), FLOAT_BITS[scores.dtype]
        self._scores, self._passes = scores, default_passes(scores)(scores)

    def count_digits(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        return self._passes.count_digits(prefix, shift, width)

    def ties(self, code: Tensor) -> Callable[[Tensor], Tensor]:
        tie = self._scores.view(self.bits.integer) == code
        counter = torch.int32 if self.size < 2**31 else torch.int64
        running = torch.zeros(self.size + 1, dtype=counter, device=tie.device)
        torch.cumsum(tie, 0, dtype=counter, out=running[1:])
        return lambda position: running[position].long()


class _Narrowing:
    """Counts on a CPU: each call keeps only the codes that share the known digits.

    Call `count_digits` from the most significant digit on. The first call reads all scores; few of
    them share a digit, so the others need little memory.
    """

    def __init__(self, scores: Blocks) -> None:
        wide = torch.float64 if scores.dtype == np.float64 else torch.float32
        self.size, self.bits = scores.size, FLOAT_BITS[wide]
        self._scores = scores
        self._near: np.ndarray | None = None  # codes that share the known digits

    def _blocks(self) -> Iterator[np.ndarray]:
        """Yield the codes that may share the known digits."""
        if self._near is not None:
            for start in range(0, self._near.size, BLOCK):
                yield self._near[start : start + BLOCK]
            return
        nan = self.bits.infinity + 1
        for start in range(0, self.size, BLOCK):
            codes = self._scores.block(start, min(start + BLOCK, self.size))
            yield np.minimum(codes, nan, out=codes)

    def count_digits(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        known, head = shift + width, int(prefix) >> (shift + width)
        counts, near, first = np.zeros(1 << width, np.int64), [], known == sum(self.bits.digits)
        for codes in self._blocks():
            if not first:
                codes = codes[codes >> known == head]
                near.append(codes)
            counts += np.bincount((codes >> shift) & ((1 << width) - 1), minlength=1 << width)
        if near:
            self._near = np.concatenate(near)
        return torch.from_numpy(counts)

    def ties(self, code: Tensor) -> Callable[[Tensor], Tensor]:
        value, found = int(code), [np.empty(0, np.int64)]
        for start in range(0, self.size, BLOCK):
            codes = self._scores.block(start, min(start + BLOCK, self.size))
            found.append(np.flatnonzero(codes == value) + start)
        positions = torch.from_numpy(np.concatenate(found))
        return lambda position: torch.searchsorted(positions, position)
