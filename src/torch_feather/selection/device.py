"""Selection on any device by counting: no sort, no data-dependent shape, nothing read by the host.

Non-negative floats order as their bits do, so the k-th smallest score is found as an integer,
digit by digit from the most significant (a radix selection, as for top-k on GPUs in Alabi et al.,
'Fast k-selection algorithms for graphics processing units', 2012): count how often each value of
the next digit occurs among the scores that share the digits known so far, and step into the bin
that holds the k-th. Among the scores equal to it, the last one to prune is found in the same way
on the flat index. Counts are integers, hence exact in any order of summation: every device, and
any number of shards whose counts are added (`shards.py`), gives the same cut, bit for bit.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .cut import Cut

TIE_BLOCK = 4096
"""Ties are counted per block of this many flat indices, then one by one within one block."""


class FloatBits(NamedTuple):
    """How the non-negative numbers of a float type read as integers."""

    integer: torch.dtype
    infinity: int
    digits: tuple[int, ...]
    """Widths in bits of the digits, most significant first; together all bits but the sign."""


FLOAT_BITS = {
    torch.float32: FloatBits(torch.int32, 0x7F80_0000, (11, 10, 10)),
    torch.float64: FloatBits(torch.int64, 0x7FF0_0000_0000_0000, (11, 11, 11, 10, 10, 10)),
}


class Passes(Protocol):
    """The operations that a selection is made of. Integers are int64, scalars 0-dimensional."""

    def __init__(self, scores: Tensor) -> None:
        """Counts over flat `scores`.

        The code of a score is its bits as an integer; that of any NaN is one above infinity's.
        """

    def count_digits(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        """How many codes equal `prefix` above bit shift + width, per value of the digit below.

        Returns 2**width counts, by (code >> shift) % 2**width.
        """

    def count_ties(self, code: Tensor, start: Tensor, block: int, bins: int) -> Tensor:
        """How many scores have this code, per block of flat indices.

        Returns `bins` counts, of the indices start + [j * block, (j + 1) * block) for bin j.
        `start` is 0 where block > 1.
        """

    def descend(
        self, counts: Tensor, rank: Tensor, prefix: Tensor, shift: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the function `descend`."""


def descend(
    counts: Tensor, rank: Tensor, prefix: Tensor, shift: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps into the first bin at which the running sum of counts reaches `rank`.

    Args:
        counts: bins along the last dimension; the others of all arguments are alike.

    Returns:
        prefix | bin << shift, the rank left within the bin, and the bin's count.
    """
    reached = counts.cumsum(-1)
    short = reached < rank.unsqueeze(-1)
    below = torch.where(short, counts, 0).sum(-1)
    here = torch.where(short, counts.sum(-1, keepdim=True), reached).amin(-1) - below
    return prefix | (short.sum(-1) << shift), rank - below, here


class TorchPasses:
    """`Passes` in plain PyTorch: any device, and `torch.compile`.

    Holds the codes and, at a time, up to three more arrays of their size.
    """

    def __init__(self, scores: Tensor) -> None:
        bits = FLOAT_BITS[scores.dtype]
        # Clearing the sign makes -0 a zero, and the NaN that x86 produces (negative) a NaN.
        codes = scores.view(bits.integer) & torch.iinfo(bits.integer).max
        self.codes = codes.clamp_(max=bits.infinity + 1)

    def count_digits(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        """See `Passes`."""
        codes, known = self.codes, shift + width
        member = (codes >> known) == (prefix >> known)
        digit = (codes >> shift) & ((1 << width) - 1)
        # Others add 0 to the bin of their own digit: one common bin for them would be one address
        # on which all threads of a GPU wait.
        counter = torch.int32 if codes.numel() < 2**31 else torch.int64
        counts = codes.new_zeros(1 << width, dtype=counter)
        return counts.index_add_(0, digit, member.to(counter)).long()

    def count_ties(self, code: Tensor, start: Tensor, block: int, bins: int) -> Tensor:
        """See `Passes`."""
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
        """See `Passes`."""
        return descend(counts, rank, prefix, shift)


def select_device(
    scores: Tensor,
    k: Tensor | int,
    *,
    passes: type[Passes] | None = None,
) -> Cut:
    """`select` in fixed shapes, with k a tensor that the host never reads.

    `torch.compile(fullgraph=True)` makes one graph of it for all k.

    Args:
        scores: flat, contiguous float32 or float64 tensor of numbers >= 0; NaN ranks above
            infinity. Not written to.
        k: number of scores to prune; a 0-dimensional int64 tensor on the device of the scores
            (taken as the nearest possible one if outside), or an int.
        passes: the implementation of the passes over memory; by default Triton kernels for CUDA
            tensors where Triton works, PyTorch elsewhere and under `torch.compile`.
    """
    if scores.dim() != 1 or not scores.is_contiguous() or scores.dtype not in FLOAT_BITS:
        raise ValueError(
            "scores must be a flat, contiguous float32 or float64 tensor, not "
            f"{scores.dtype} of shape {tuple(scores.shape)} with strides {scores.stride()}"
        )
    bits = FLOAT_BITS[scores.dtype]
    total = scores.numel()
    k = _count_tensor(k, total, scores.device)
    over = (passes or default_passes(scores))(scores)

    zero = torch.zeros_like(k)
    code, rank, equal, shift = zero, k, zero, sum(bits.digits)
    for width in bits.digits:
        shift -= width
        counts = over.count_digits(code, shift, width)
        code, rank, equal = over.descend(counts, rank, code, shift)
    # All NaN compare as one, but none ties: a cut among them is the cut at infinity, see `Cut`.
    tied = (equal > rank) & (code <= bits.infinity)

    last = zero
    blocks = max(1, -(-total // TIE_BLOCK))
    for block, bins in ((TIE_BLOCK, blocks), (1, TIE_BLOCK)):
        counts = over.count_ties(code, last, block, bins)
        last, rank, _ = over.descend(counts, rank, last, block.bit_length() - 1)
    return cut_at(k, code, tied, torch.where(tied, last, total - 1), bits)


def cut_at(k: Tensor, code: Tensor, tied: Tensor, last: Tensor, bits: FloatBits) -> Cut:
    """The cut at the code of the k-th score; `tied` says whether a kept score has it too."""
    dtype = torch.float32 if bits.integer == torch.int32 else torch.float64
    code = code.clamp(max=bits.infinity)
    value = code.to(bits.integer).view(dtype)
    # One step towards 0 is one less as an integer.
    threshold = (code - tied.long()).clamp(min=0).to(bits.integer).view(dtype)
    some = k > 0
    return Cut(
        torch.where(some, value, -1.0), torch.where(some, last, -1), torch.where(some, threshold, 0)
    )


def _count_tensor(k: Tensor | int, total: int, device: torch.device) -> Tensor:
    if isinstance(k, Tensor):
        return k.to(device, torch.int64, non_blocking=True).clamp(0, total)
    if not 0 <= k <= total:
        raise ValueError(f"k = {k} is outside 0..{total}, the number of scores")
    return torch.full((), k, dtype=torch.int64, device=device)


def default_passes(scores: Tensor) -> type[Passes]:
    """The fastest way to count on the device of the scores."""
    # A compiler writes kernels of its own.
    if scores.is_cuda and not torch.compiler.is_compiling() and _triton_works(scores.device):
        from .triton_kernels import TritonPasses

        return TritonPasses
    return TorchPasses


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether a selection by Triton runs here, tried once."""
    try:
        from .triton_kernels import TritonPasses

        select_device(torch.ones(2, device=device), 1, passes=TritonPasses)
    except ImportError:  # not on this platform
        return False
    except Exception as error:  # no C compiler, a device too old, ...: PyTorch does without
        warnings.warn(
            f"Triton does not work on {device}, so thresholds are selected by slower PyTorch "
            f"operations: {error}",
            stacklevel=2,
        )
        return False
    return True
