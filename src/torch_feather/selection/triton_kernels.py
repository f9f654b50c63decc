"""`Passes` as Triton kernels: each reads the scores once and writes only counts.

Imported for CUDA tensors only, since Triton is not available on every platform of PyTorch.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .float_bits import FLOAT_BITS

BLOCK = 8192
"""Scores that a program holds in registers at a time."""
PROGRAMS = 512
"""Maximum number of programs that count digits; each ends with atomic additions to all bins."""
CHUNK = 2048
"""Counts that `descend` sums at a time."""


@triton.jit
def _load_codes(scores, position, inside, INFINITY: tl.constexpr):
    bits = tl.load(scores + position, mask=inside, other=0)
    all_but_sign: tl.constexpr = 0x7FFFFFFF if INFINITY < 0x7FFFFFFF else 0x7FFFFFFFFFFFFFFF
    return tl.minimum(bits & all_but_sign, INFINITY + 1)


@triton.jit(do_not_specialize_on_alignment=["prefix"])
def _count_digits(
    scores,
    size,
    prefix,
    counts,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BINS: tl.constexpr = 1 << WIDTH
    head = (tl.load(prefix) >> (SHIFT + WIDTH)).to(scores.dtype.element_ty)
    own = tl.zeros([BINS], tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first, size, stride):
        position = start + tl.arange(0, BLOCK)
        inside = position < size
        code = _load_codes(scores, position, inside, INFINITY)
        digit = ((code >> SHIFT) & (BINS - 1)).to(tl.int32)
        own += tl.histogram(digit, BINS, mask=inside & ((code >> (SHIFT + WIDTH)) == head))
    tl.atomic_add(counts + tl.arange(0, BINS), own.to(tl.int64), mask=own > 0, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["code", "start"])
def _count_ties(
    scores,
    size,
    code,
    start,
    counts,
    bins,
    INFINITY: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    bin = tl.program_id(0).to(tl.int64) * BINS + tl.arange(0, BINS)
    position = tl.load(start) + bin[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (position >= 0) & (position < size)
    target = tl.load(code).to(scores.dtype.element_ty)
    tie = inside & (_load_codes(scores, position, inside, INFINITY) == target)
    tl.store(counts + bin, tl.sum(tie.to(tl.int64), 1), mask=bin < bins)


# One binary for all calls: specializing on aligned or round arguments gains nothing here.
@triton.jit(do_not_specialize=["bins", "shift"], do_not_specialize_on_alignment=["rank", "prefix"])
def _descend(counts, bins, rank, prefix, found, shift, CHUNK: tl.constexpr):
    target = tl.load(rank)
    digit = tl.zeros([], tl.int64)
    below = tl.zeros([], tl.int64)
    seen = tl.zeros([], tl.int64)
    reached = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for start in range(0, bins, CHUNK):
        bin = start + tl.arange(0, CHUNK)
        count = tl.load(counts + bin, mask=bin < bins, other=0)
        running = seen + tl.cumsum(count, 0)
        short = running < target
        digit += tl.sum((short & (bin < bins)).to(tl.int64), 0)
        below += tl.sum(tl.where(short, count, 0), 0)
        reached = tl.minimum(reached, tl.min(tl.where(short, 0x7FFFFFFFFFFFFFFF, running), 0))
        seen += tl.sum(count, 0)
    tl.store(found, tl.load(prefix) | (digit << shift))
    tl.store(found + 1, target - below)
    tl.store(found + 2, tl.minimum(reached, seen) - below)


class TritonPasses:
    """`Passes` on a CUDA device.

    Args:
        scores: flat float32 or float64 tensor of numbers >= 0, on a CUDA device.

    Example:
        >>> from torch_feather.selection.counting import TorchPasses
        >>> gpu = torch.cuda.is_available()
        >>> device, passes = ("cuda", TritonPasses) if gpu else ("cpu", TorchPasses)
        >>> counts = passes(torch.tensor([1.0, 2.0, 1.0], device=device)).count_digits(
        ...     torch.tensor(0, device=device), shift=21, width=11
        ... )
        >>> counts[torch.tensor([1.0, 2.0]).view(torch.int32) >> 21].tolist()
        [2, 1]
    """

    def __init__(self, scores: Tensor) -> None:
        bits = FLOAT_BITS[scores.dtype]
        self.bits = scores.view(bits.integer)
        self.infinity = bits.infinity

    def count_digits(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        counts = self.bits.new_zeros(1 << width, dtype=torch.int64)
        size = self.bits.numel()
        grid = (min(PROGRAMS, triton.cdiv(size, BLOCK)),)
        if size:
            with torch.cuda.device_of(self.bits):
                _count_digits[grid](
                    self.bits, size, prefix, counts, shift, width, self.infinity, BLOCK, num_warps=8
                )
        return counts

    def count_ties(self, code: Tensor, start: Tensor, block: int, bins: int) -> Tensor:
        counts = self.bits.new_empty(bins, dtype=torch.int64)
        size, per_program = self.bits.numel(), max(1, BLOCK // block)
        grid = (triton.cdiv(bins, per_program),)
        with torch.cuda.device_of(self.bits):
            _count_ties[grid](
                self.bits,
                size,
                code,
                start,
                counts,
                bins,
                self.infinity,
                per_program,
                block,
                num_warps=8,
            )
        return counts

    def descend(
        self, counts: Tensor, rank: Tensor, prefix: Tensor, shift: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = counts.new_empty(3)
        with torch.cuda.device_of(counts):
            _descend[(1,)](counts, counts.numel(), rank, prefix, found, shift, CHUNK, num_warps=8)
        code, left, count = found.unbind()
        return code, left, count
