"""Selection on any device by counting: no sort, no data-dependent shape, no read by the host.

Non-negative floats have the order of their bits. So the k-th smallest score is found as an integer,
digit by digit, from the most significant one. Each pass counts the values of the next digit among
the scores that share the known digits. Then it steps into the bin that holds the k-th score. Among
the scores equal to it, the last one to prune is found in the same way, by flat index.

Counts are integers, hence exact in any order of summation. So every device gives the same cutoff,
bit for bit, and so does any number of shards whose counts are added (`sharded.py`).

Source: radix selection, as in Alabi et al., Fast k-selection algorithms for graphics processing
units (2012).
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from .counting import Passes, TorchPasses
from .cutoff import Cutoff
from .float_bits import FLOAT_BITS, FloatBits

TIE_BLOCK = 4096
"""Ties are counted per block of this many flat indices, then one by one within one block."""


def select_device(
    scores: Tensor,
    k: Tensor | int,
    *,
    passes: type[Passes] | None = None,
) -> Cutoff:
    """Return the cutoff of the k smallest scores, in fixed shapes and without a host read of k.

    `torch.compile(fullgraph=True)` makes one graph of it for all k.

    Args:
        scores: flat, contiguous float32 or float64 tensor of numbers >= 0; NaN ranks above
            infinity. Not written to.
        k: number of scores to prune; a 0-dimensional int64 tensor on the device of the scores
            (clamped to the possible range), or an int.
        passes: the implementation of the passes over memory. Default: Triton kernels for CUDA
            tensors if Triton works, else PyTorch; PyTorch under `torch.compile`.

    Raises:
        ValueError: `scores` has another type or layout, or the int k is out of range.

    Example:
        >>> float(select_device(torch.tensor([3.0, 1.0, 2.0]), 2).value)
        2.0
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
    # All NaN have one code but are not ties: a cutoff among them becomes the one at infinity.
    tied = (equal > rank) & (code <= bits.infinity)

    last = zero
    blocks = max(1, -(-total // TIE_BLOCK))
    for block, bins in ((TIE_BLOCK, blocks), (1, TIE_BLOCK)):
        counts = over.count_ties(code, last, block, bins)
        last, rank, _ = over.descend(counts, rank, last, block.bit_length() - 1)
    return cutoff_at(k, code, tied, torch.where(tied, last, total - 1), bits)


def cutoff_at(k: Tensor, code: Tensor, tied: Tensor, last: Tensor, bits: FloatBits) -> Cutoff:
    """Return the cutoff at the code of the k-th score.

    Args:
        k: number of pruned scores.
        code: code of the k-th score (see `Passes`).
        tied: whether a kept score has this code too.
        last: flat index of the last pruned score that has it.
        bits: the float type of the scores.

    Example:
        >>> one = torch.tensor(1.0).view(torch.int32).long()
        >>> k, tied, last = torch.tensor(2), torch.tensor(False), torch.tensor(4)
        >>> float(cutoff_at(k, one, tied, last, FLOAT_BITS[torch.float32]).value)
        1.0
    """
    dtype = torch.float32 if bits.integer == torch.int32 else torch.float64
    code = code.clamp(max=bits.infinity)
    value = code.to(bits.integer).view(dtype)
    # One step towards 0 is one less as an integer.
    threshold = (code - tied.long()).clamp(min=0).to(bits.integer).view(dtype)
    some = k > 0
    return Cutoff(
        torch.where(some, value, -1.0), torch.where(some, last, -1), torch.where(some, threshold, 0)
    )


def _count_tensor(k: Tensor | int, total: int, device: torch.device) -> Tensor:
    """Return k as a tensor on the device, clamped to 0..total; an int must be in this range."""
    if isinstance(k, Tensor):
        return k.to(device, torch.int64, non_blocking=True).clamp(0, total)
    if not 0 <= k <= total:
        raise ValueError(f"k = {k} is outside 0..{total}, the number of scores")
    return torch.full((), k, dtype=torch.int64, device=device)


def default_passes(scores: Tensor) -> type[Passes]:
    """Return the fastest `Passes` on the device of the scores.

    Args:
        scores: flat float32 or float64 tensor.

    Example:
        >>> default_passes(torch.ones(2)).__name__
        'TorchPasses'
    """
    # The compiler writes its own kernels.
    if scores.is_cuda and not torch.compiler.is_compiling() and _triton_works(scores.device):
        from .triton_kernels import TritonPasses

        return TritonPasses
    return TorchPasses


@cache
def _triton_works(device: torch.device) -> bool:
    """Return whether a selection by Triton works on `device`; cached."""
    try:
        from .triton_kernels import TritonPasses

        select_device(torch.ones(2, device=device), 1, passes=TritonPasses)
    except ImportError:  # not on this platform
        return False
    except Exception as error:  # no C compiler, an old device, ...
        warnings.warn(
            f"Triton does not work on {device}: {error}. Thresholds are selected by slower "
            "PyTorch operations.",
            stacklevel=2,
        )
        return False
    return True
