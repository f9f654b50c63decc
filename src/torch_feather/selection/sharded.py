"""Selection over shards: every process counts its own scores, and all find the same cutoff.

The digits of the k-th score are found as in `device.py`, from the summed counts of all shards. Tied
scores are then ordered by their index in the full tensor, digit by digit too. Several selections
share their communication: one sum of up to 2048 counts per selection and digit. Counts below 2^31
are exchanged as 32-bit integers: 16 kB per selection of float32 scores, and 8 kB per 11 bits of an
index if scores are tied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import devices
from .counting import Passes, descend
from .cutoff import Cutoff, cutoff_at
from .device import default_passes
from .float_bits import FLOAT_BITS

DIGIT = 11
"""Bits of an index found per pass."""
BLOCK = 1 << 16
"""Scores counted at a time on a CPU."""


def select_sharded(
    scores: Sequence[Tensor],
    k: Tensor,
    *,
    sizes: Sequence[int],
    total: Callable[[Tensor], Tensor],
    local_positions: Callable[[Tensor], Tensor],
    fillers: Sequence[int] | None = None,
) -> list[Cutoff]:
    """Return the cutoffs that prune the k smallest scores, ordered by (score, global index).

    Args:
        scores: the local scores of each selection, flat and contiguous, in global order. NaN ranks
            above infinity, so NaN can stand for a score that another process counts.
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
    bits = FLOAT_BITS[scores[0].dtype]
    each = [(j, _passes(one)) for j, one in enumerate(scores)]
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
    last = torch.tensor([one.numel() for one in scores], device=k.device) - 1
    if devices.synchronizes(k.device) or bool(tied.any()):
        ties = [_before(one.view(bits.integer) == code[j]) for j, one in enumerate(scores)]
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


def _before(tie: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that counts the ties before given local positions."""
    if not devices.synchronizes(tie.device):
        found = tie.nonzero().flatten()
        return lambda position: torch.searchsorted(found, position)
    counter = torch.int32 if tie.numel() < 2**31 else torch.int64
    running = torch.zeros(tie.numel() + 1, dtype=counter, device=tie.device)
    torch.cumsum(tie, 0, dtype=counter, out=running[1:])
    return lambda position: running[position].long()


def _passes(scores: Tensor) -> Passes | _Narrowing:
    """Return the fastest counter of digits on the device of the scores."""
    if devices.synchronizes(scores.device):
        return default_passes(scores)(scores)
    return _Narrowing(scores)


class _Narrowing:
    """`Passes.count_digits` on a CPU: each call keeps only the codes that share the known digits.

    Call it from the most significant digit on.
    """

    def __init__(self, scores: Tensor) -> None:
        bits = FLOAT_BITS[scores.dtype]
        self._bits, self._raw = bits, True
        self._codes = scores.view(bits.integer).numpy()

    def count_digits(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        """Count codes by one digit; arguments and result as for `Passes.count_digits`."""
        known, head = shift + width, int(prefix) >> (shift + width)
        every_bit = torch.iinfo(self._bits.integer).max
        counts, near = np.zeros(1 << width, dtype=np.int64), [self._codes[:0]]
        for start in range(0, self._codes.size, BLOCK):
            codes = self._codes[start : start + BLOCK]
            if self._raw:
                codes = np.minimum(codes & every_bit, self._bits.infinity + 1)
            if known < sum(self._bits.digits):
                codes = codes[codes >> known == head]
                near.append(codes)
            counts += np.bincount((codes >> shift) & ((1 << width) - 1), minlength=1 << width)
        if known < sum(self._bits.digits):
            self._codes, self._raw = np.concatenate(near), False
        return torch.from_numpy(counts)
