"""Selection over shards: every process counts its own scores, and all find the same cut.

The digits of the k-th score are found as in `device.py`, with the counts of all shards added. Tied
scores are then ordered by their index in the whole, digit by digit too. Several selections share
their exchanges: each of them is one sum of 2048 counts per selection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import devices
from .cut import Cut
from .device import FLOAT_BITS, Passes, cut_at, default_passes, descend

DIGIT = 11
"""Bits of an index that are found at a time."""
BLOCK = 1 << 16
"""Scores that the CPU counts at a time."""


def select_shards(
    scores: Sequence[Tensor],
    k: Tensor,
    *,
    sizes: Sequence[int],
    total: Callable[[Tensor], Tensor],
    places: Callable[[Tensor], Tensor],
) -> list[Cut]:
    """The cuts that prune the k smallest scores, in the order of (score, index in the whole).

    Args:
        scores: of each selection, what this process holds: flat and contiguous, in the order of
            the whole. NaN ranks above infinity; so it may stand for what another process counts.
        k: of each selection, int64 of shape (selections,).
        sizes: of each selection, how many scores there are in the whole.
        total: sums a tensor of counts over the processes, in place or not.
        places: how many of the scores here precede an index of the whole; int64 of shape
            (selections, n), indices and places counted from 0 in each selection.

    Returns:
        One for each selection, alike on all processes but for `last`, which is the index among the
        scores that are here.
    """
    bits = FLOAT_BITS[scores[0].dtype]
    counters = [_passes(one) for one in scores]
    code, rank, shift = torch.zeros_like(k), k, sum(bits.digits)
    equal = code
    for width in bits.digits:
        shift -= width
        counts = [c.count_digits(code[j], shift, width) for j, c in enumerate(counters)]
        code, rank, equal = descend(total(torch.stack(counts)), rank, code, shift)
    tied = (equal > rank) & (code <= bits.infinity)  # no NaN ties, see `Cut`
    here = torch.tensor([one.numel() for one in scores], device=k.device)
    last = here - 1
    if devices.synchronizes(k.device) or bool(tied.any()):
        ties = [_before(one.view(bits.integer) == code[j]) for j, one in enumerate(scores)]
        index = _last_tie(ties, rank, max(sizes), total, places)
        last = torch.where(tied, places(index[:, None] + 1)[:, 0] - 1, last)
    return [cut_at(*fields, bits) for fields in zip(k, code, tied, last, strict=True)]


def _last_tie(
    ties: Sequence[Callable[[Tensor], Tensor]],
    rank: Tensor,
    size: int,
    total: Callable[[Tensor], Tensor],
    places: Callable[[Tensor], Tensor],
) -> Tensor:
    """Index in the whole of the tie number `rank`, from 1, of each selection."""
    index, shift = torch.zeros_like(rank), max(1, (size - 1).bit_length())
    while shift > 0:
        width = min(DIGIT, shift)
        shift -= width
        edges = torch.arange((1 << width) + 1, device=rank.device) << shift
        near = places(index[:, None] + edges)
        counts = [before(place).diff() for before, place in zip(ties, near, strict=True)]
        index, rank, _ = descend(total(torch.stack(counts)), rank, index, shift)
    return index


def _before(tie: Tensor) -> Callable[[Tensor], Tensor]:
    """How many are true before given places."""
    if not devices.synchronizes(tie.device):
        found = tie.nonzero().flatten()
        return lambda place: torch.searchsorted(found, place)
    counter = torch.int32 if tie.numel() < 2**31 else torch.int64
    running = torch.zeros(tie.numel() + 1, dtype=counter, device=tie.device)
    torch.cumsum(tie, 0, dtype=counter, out=running[1:])
    return lambda place: running[place].long()


def _passes(scores: Tensor) -> Passes | _Narrowing:
    if devices.synchronizes(scores.device):
        return default_passes(scores)(scores)
    return _Narrowing(scores)


class _Narrowing:
    """`Passes.count_digits` on the CPU: each call keeps only what shares the digits known by then.

    Calls come from the most significant digit on.
    """

    def __init__(self, scores: Tensor) -> None:
        bits = FLOAT_BITS[scores.dtype]
        self._bits, self._raw = bits, True
        self._codes = scores.view(bits.integer).numpy()

    def count_digits(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        """See `Passes`."""
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
