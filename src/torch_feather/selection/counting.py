"""The passes over memory that a selection consists of.

`Passes` is the interface, `TorchPasses` its form in plain PyTorch; `triton_kernels.py` has another.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .cutoff import Cutoff, cutoff_at
from .float_bits import FLOAT_BITS

MOST_SORTED = 1 << 26
"""Scores that are sorted at most; more are counted."""
TIE_BLOCK = 4096
"""Ties are counted per block of this many flat indices, then one by one within one block."""


class Passes(Protocol):
    """The operations that a selection consists of. Integers are int64, scalars 0-dimensional.

    Example:
        >>> passes: Passes = TorchPasses(torch.tensor([1.0, 2.0, 1.0]))
        >>> int(passes.count_digits(torch.tensor(0), 21, 11).sum())
        3
    """

    def __init__(self, scores: Tensor) -> None:
        """Count over flat `scores`.

        The code of a score is its bits as an integer; the code of any NaN is infinity's plus 1.
        """

    def count_digits(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        """Count codes by the value of one digit, (code >> shift) % 2**width.

        Only codes that equal `prefix` from bit shift + width upwards are counted.

        Returns:
            Counts of shape (2**width,).
        """

    def cutoff(self, k: Tensor) -> Cutoff:
        """Return the cutoff of the k smallest scores.

        Args:
            k: 0-dimensional int64 on the device of the scores; clamped to the possible range.
        """


def descend(
    counts: Tensor, rank: Tensor, prefix: Tensor, shift: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Step into the first bin at which the running sum of counts reaches `rank`.

    Args:
        counts: counts, with bins along the last dimension, after any batch dimensions.
        rank: rank of the code to find, from 1. Like `prefix`, it has the batch dimensions.
        prefix: the known upper digits of the code.
        shift: lowest bit of the digit that was counted.

    Returns:
        prefix | bin << shift, the rank within the bin, and the count of the bin.

    Example:
        >>> zero = torch.tensor(0)
        >>> descend(torch.tensor([2, 0, 3]), torch.tensor(4), zero, 0)  # 4th of 5: bin 2, 2nd of 3
        (tensor(2), tensor(2), tensor(3))
    """
    reached = counts.cumsum(-1)
    short = reached < rank.unsqueeze(-1)
    below = torch.where(short, counts, 0).sum(-1)
    count = torch.where(short, counts.sum(-1, keepdim=True), reached).amin(-1) - below
    return prefix | (short.sum(-1) << shift), rank - below, count


class TorchPasses:
    """`Passes` in plain PyTorch, for any device and for `torch.compile`.

    Up to `MOST_SORTED` scores are sorted: on a GPU, this takes few launches and is faster than
    counting. More are counted, since a sort takes memory.

    Memory for counting: the codes and up to three more arrays of their size at a time.

    Args:
        scores: flat float32 or float64 tensor of numbers >= 0; NaN ranks above infinity.

    Example:
        >>> passes = TorchPasses(torch.tensor([1.0, 2.0, 1.0]))
        >>> code = torch.tensor(1.0).view(torch.int32)
        >>> passes.count_ties(code, torch.tensor(0), 1, 3)
        tensor([1, 0, 1])
    """

    def __init__(self, scores: Tensor) -> None:
        bits = self.bits = FLOAT_BITS[scores.dtype]
        # Clearing the sign makes -0 a zero, and the NaN that x86 produces (negative) a NaN.
        codes = scores.view(bits.integer) & torch.iinfo(bits.integer).max
        self.codes = codes.clamp_(max=bits.infinity + 1)

    def count_digits(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        codes, known = self.codes, shift + width
        member = (codes >> known) == (prefix >> known)
        digit = (codes >> shift) & ((1 << width) - 1)
        # Non-members add 0 to the bin of their own digit. In one common bin, all threads of a GPU
        # would wait for the same address.
        counter = torch.int32 if codes.numel() < 2**31 else torch.int64
        counts = codes.new_zeros(1 << width, dtype=counter)
        return counts.index_add_(0, digit, member.to(counter)).long()

    def cutoff(self, k: Tensor) -> Cutoff:
        total = self.codes.numel()
        k = k.clamp(0, total)
        code, tied, last = self._sorted(k) if 0 < total <= MOST_SORTED else self._counted(k)
        return cutoff_at(k, code, tied, torch.where(tied, last, total - 1), self.bits)

    def _sorted(self, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the code of the k-th score, whether a kept score has it, and the k-th index."""
        codes, order = self.codes.sort(stable=True)
        index = (k - 1).clamp_min(0)
        code, total = codes.take(index), codes.numel()
        tied = (codes.take(k.clamp(max=total - 1)) == code) & (k < total)
        # All NaN have one code but are not ties: a cutoff among them becomes the one at infinity.
        return code.long(), tied & (code <= self.bits.infinity), order.take(index)

    def _counted(self, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same as `_sorted`, digit by digit."""
        zero = torch.zeros_like(k)
        code, rank, equal, shift = zero, k, zero, sum(self.bits.digits)
        for width in self.bits.digits:
            shift -= width
            code, rank, equal = descend(self.count_digits(code, shift, width), rank, code, shift)
        tied = (equal > rank) & (code <= self.bits.infinity)
        last, blocks = zero, max(1, -(-self.codes.numel() // TIE_BLOCK))
        for block, bins in ((TIE_BLOCK, blocks), (1, TIE_BLOCK)):
            counts = self.count_ties(code, last, block, bins)
            last, rank, _ = descend(counts, rank, last, block.bit_length() - 1)
        return code, tied, last

    def count_ties(self, code: Tensor, start: Tensor, block: int, bins: int) -> Tensor:
        """Count the scores that have this code, per block of flat indices.

        Args:
            code: the code.
            start: index of the first block; 0 if block > 1.
            block: indices per block.
            bins: number of blocks.

        Returns:
            Counts of shape (bins,).
        """
        size = self.codes.numel()
        counts = self.codes.new_zeros(bins, dtype=torch.int64)
        if size == 0:
            return counts
        if block == 1:
            position = start + torch.arange(bins, device=self.codes.device)
            near = self.codes.take(position.clamp(0, size - 1))
            return ((near == code) & (position >= 0) & (position < size)).long()
        rows = -(-size // block)
        tie = torch.nn.functional.pad(self.codes == code, (0, rows * block - size), value=False)
        counts[:rows] = tie.view(rows, block).sum(1)
        return counts
