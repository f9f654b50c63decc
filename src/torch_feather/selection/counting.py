"""The passes over memory that a selection by counting consists of.

`Passes` is the interface, `TorchPasses` its form in plain PyTorch; `triton_kernels.py` has another.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .float_bits import FLOAT_BITS


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

    def count_ties(self, code: Tensor, start: Tensor, block: int, bins: int) -> Tensor:
        """Count the scores that have this code, per block of flat indices.

        Bin j holds the indices start + [j * block, (j + 1) * block). `start` is 0 if block > 1.

        Returns:
            Counts of shape (bins,).
        """

    def descend(
        self, counts: Tensor, rank: Tensor, prefix: Tensor, shift: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step into the bin that holds `rank`; arguments as for the function `descend`."""


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

    Memory: the codes and up to three more arrays of their size at a time.

    Args:
        scores: flat float32 or float64 tensor of numbers >= 0; NaN ranks above infinity.

    Example:
        >>> passes = TorchPasses(torch.tensor([1.0, 2.0, 1.0]))
        >>> code = torch.tensor(1.0).view(torch.int32)
        >>> passes.count_ties(code, torch.tensor(0), 1, 3)
        tensor([1, 0, 1])
    """

    def __init__(self, scores: Tensor) -> None:
        bits = FLOAT_BITS[scores.dtype]
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

    def count_ties(self, code: Tensor, start: Tensor, block: int, bins: int) -> Tensor:
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

    def descend(
        self, counts: Tensor, rank: Tensor, prefix: Tensor, shift: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return descend(counts, rank, prefix, shift)
