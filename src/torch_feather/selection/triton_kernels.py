"""A selection as Triton kernels: at most four launches for float32, one for few scores.

Three passes find the k-th score digit by digit; each counts its digit and, in the program that
arrives last, descends into the bin of the k-th score. The fourth pass finds the last tied score
that is pruned; without such a tie it reads nothing. Few scores stay in the registers of one
program.

Imported for CUDA tensors only, since Triton is not available on every platform of PyTorch.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launching
from .cutoff import Cutoff
from .float_bits import FLOAT_BITS, wide

BLOCK = 8192
"""Scores that a program holds in registers at a time."""
PROGRAMS = 512
"""Maximum number of programs of a pass, at most `MOST_PROGRAMS`."""
MOST_PROGRAMS = 2048
SMALL = 8192
"""Scores that one program selects from alone."""
STATE = 8
"""Numbers in front of the counts: programs that arrived, code, rank in its bin, its count."""
MOST_BINS = 2048
MINUS_ONE = {32: -0x4080_0000, 64: -0x4010_0000_0000_0000}
"""The bits of -1.0 by width of the scores, as integers."""
DIGITS = {32: (9, 11, 11), 64: (11, 11, 11, 10, 10, 10)}
"""Widths of the digits by width of the scores. The first one is counted in registers, which costs
time for each bin. The others are counted in memory: few scores share the digits before them."""


@triton.jit
def widened(x):
    """Return half-precision numbers in float32, others unchanged.

    Example:
        >>> widened.fn.__name__
        'widened'
    """
    if x.dtype == tl.bfloat16:  # by hand: Triton's interpreter does not know the smallest ones
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _load_codes(scores, position, inside, INFINITY: tl.constexpr):
    """Return the bits of |score| as integers; all NaN get the code after infinity."""
    value = widened(tl.load(scores + position, mask=inside, other=0.0))
    if INFINITY < 0x7FFFFFFF:
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = value.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    return tl.minimum(bits, INFINITY + 1)


@triton.jit
def _descend(count, bin, rank):
    """Return the bin that holds the k-th score, the rank in it, and its count."""
    short = tl.cumsum(count, 0) < rank
    digit = tl.sum(short.to(tl.int64), 0)
    below = tl.sum(tl.where(short, count, 0), 0)
    return digit, rank - below, tl.sum(tl.where(bin == digit, count, 0), 0)


@triton.jit
def _write_cutoff(
    k, code, tied, found, size, last, bits, INFINITY: tl.constexpr, MINUS_ONE: tl.constexpr
):
    code = tl.minimum(code, INFINITY)
    # One step towards 0 is one less as an integer.
    threshold = tl.maximum(code - tied.to(tl.int64), 0)
    some = k > 0
    kind = bits.dtype.element_ty
    tl.store(bits, tl.where(some, code, MINUS_ONE).to(kind))
    tl.store(bits + 1, tl.where(some, threshold, 0).to(kind))
    tl.store(last, tl.where(some, tl.where(tied, found, size - 1), -1))


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["scores", "k"])
def _count_digits(
    scores, size, k, space, SHIFT: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr,
    DESCENDS: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    BINS: tl.constexpr = 1 << WIDTH
    counts = space + STATE
    bin = tl.arange(0, BINS)
    known = tl.load(space + 1)
    own = tl.zeros([BINS], tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first, size, stride):
        position = start + tl.arange(0, BLOCK)
        inside = position < size
        code = _load_codes(scores, position, inside, INFINITY)
        digit = ((code >> SHIFT) & (BINS - 1)).to(tl.int32)
        if FIRST:
            own += tl.histogram(digit, BINS, mask=inside)
        else:
            member = inside & ((code >> (SHIFT + WIDTH)) == (known >> (SHIFT + WIDTH)))
            # Equal scores would wait for one address. So one digit per block is added up first.
            common = tl.max(tl.where(member, digit, -1), 0)
            if common >= 0:
                same = member & (digit == common)
                tl.atomic_add(counts + common, tl.sum(same.to(tl.int64), 0), sem="relaxed")
                one = tl.full([BLOCK], 1, tl.int64)
                tl.atomic_add(counts + digit, one, mask=member & (digit != common), sem="relaxed")
    if FIRST:
        tl.atomic_add(counts + bin, own.to(tl.int64), mask=own > 0, sem="relaxed")
    if DESCENDS:
        tl.debug_barrier()
        arrived = tl.atomic_add(space, 1, sem="acq_rel")
        if arrived == tl.num_programs(0) - 1:
            count = tl.load(counts + bin, volatile=True)
            if FIRST:
                rank = tl.minimum(tl.maximum(tl.load(k), 0), size)
                prefix = rank * 0
            else:
                rank = tl.load(space + 2)
                prefix = known
            digit, rank, equal = _descend(count, bin, rank)
            tl.store(space + 1, prefix | (digit << SHIFT))
            tl.store(space + 2, rank)
            tl.store(space + 3, equal)
            tl.store(space, 0)  # ready for the next pass
            tl.store(counts + bin, tl.zeros([BINS], tl.int64))


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["scores", "k"])
def _find_tie(
    scores, size, k, space, last, bits, INFINITY: tl.constexpr, MINUS_ONE: tl.constexpr,
    BLOCK: tl.constexpr, STATE: tl.constexpr, MOST_PROGRAMS: tl.constexpr,
):  # fmt: skip
    count = tl.minimum(tl.maximum(tl.load(k), 0), size)
    code = tl.load(space + 1)
    rank = tl.load(space + 2)
    # All NaN have one code but are not ties: a cutoff among them becomes the one at infinity.
    tied = (tl.load(space + 3) > rank) & (code <= INFINITY) & (count > 0)
    programs = tl.num_programs(0)
    program = tl.program_id(0)
    counts = space + STATE
    length = tl.cdiv(size, programs * BLOCK) * BLOCK
    if tied:
        first = program.to(tl.int64) * length
        own = tl.zeros([], tl.int64)
        for start in range(first, tl.minimum(first + length, size), BLOCK):
            position = start + tl.arange(0, BLOCK)
            inside = position < size
            same = _load_codes(scores, position, inside, INFINITY) == code
            own += tl.sum((inside & same).to(tl.int64), 0)
        tl.store(counts + program, own)
    tl.debug_barrier()
    arrived = tl.atomic_add(space, 1, sem="acq_rel")
    if arrived == programs - 1:
        found = size.to(tl.int64) - 1
        if tied:
            j = tl.arange(0, MOST_PROGRAMS)
            ties = tl.load(counts + j, mask=j < programs, other=0, volatile=True)
            range_number, left, _ = _descend(ties, j, rank)
            first = range_number * length
            found = first
            seen = tl.zeros([], tl.int64)
            for start in range(first, tl.minimum(first + length, size), BLOCK):
                position = start + tl.arange(0, BLOCK)
                inside = position < size
                same = _load_codes(scores, position, inside, INFINITY) == code
                tie = (inside & same).to(tl.int64)
                found += tl.sum((inside & (seen + tl.cumsum(tie, 0) < left)).to(tl.int64), 0)
                seen += tl.sum(tie, 0)
            tl.store(counts + j, tl.zeros([MOST_PROGRAMS], tl.int64))
        tl.store(space, 0)
        _write_cutoff(count, code, tied, found, size, last, bits, INFINITY, MINUS_ONE)


@triton.jit
def _next_digit(codes, inside, code, rank, KNOWN: tl.constexpr, SHIFT: tl.constexpr):
    member = inside & ((codes >> KNOWN) == (code >> KNOWN))
    digit = ((codes >> SHIFT) & ((1 << (KNOWN - SHIFT)) - 1)).to(tl.int32)
    counts = tl.histogram(digit, 256, mask=member).to(tl.int64)
    digit_of_k, rank, equal = _descend(counts, tl.arange(0, 256), rank)
    return code | (digit_of_k << SHIFT), rank, equal


@triton.jit(do_not_specialize=["size"], do_not_specialize_on_alignment=["scores", "k"])
def _select_small(
    scores, size, k, last, bits, WIDTH: tl.constexpr, INFINITY: tl.constexpr,
    MINUS_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    position = tl.arange(0, BLOCK)
    inside = position < size
    codes = _load_codes(scores, position, inside, INFINITY)
    count = tl.minimum(tl.maximum(tl.load(k), 0), size).to(tl.int64)
    rank = count
    code = count * 0
    equal = code
    for number in tl.static_range((WIDTH + 6) // 8):
        code, rank, equal = _next_digit(
            codes, inside, code, rank, WIDTH - 1 - 8 * number,
            WIDTH - 9 - 8 * number if 9 + 8 * number < WIDTH else 0,
        )  # fmt: skip
    tied = (equal > rank) & (code <= INFINITY) & (count > 0)
    tie = (inside & (codes == code)).to(tl.int64)
    found = tl.sum((inside & (tl.cumsum(tie, 0) < rank)).to(tl.int64), 0)
    _write_cutoff(count, code, tied, found, size, last, bits, INFINITY, MINUS_ONE)


class TritonPasses:
    """`Passes` on a CUDA device.

    Args:
        scores: flat floating-point tensor on a CUDA device, whose absolute values are the scores.

    Example:
        >>> from torch_feather.selection.counting import TorchPasses
        >>> gpu = torch.cuda.is_available()
        >>> device, passes = ("cuda", TritonPasses) if gpu else ("cpu", TorchPasses)
        >>> scores = torch.tensor([3.0, 1.0, 2.0], device=device)
        >>> float(passes(scores).cutoff(torch.tensor(2, device=device)).value)
        2.0
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores, self.wide = scores, wide(scores.dtype)
        self.infinity = FLOAT_BITS[self.wide].infinity
        self.integer = FLOAT_BITS[self.wide].integer

    def count_digits(self, prefix: Tensor, shift: int, width: int) -> Tensor:
        space = self.scores.new_zeros(STATE + (1 << width), dtype=torch.int64)
        space[1] = prefix
        self._count(prefix, space, shift, width, descends=False)
        return space[STATE:]

    def cutoff(self, k: Tensor) -> Cutoff:
        size, width = self.scores.numel(), torch.iinfo(self.integer).bits
        # One piece of memory, so that one copy moves a cutoff.
        memory = torch.empty(1 + width // 32, dtype=torch.int64, device=self.scores.device)
        last, bits = memory[:1], memory[1:].view(self.integer)
        constants = {"INFINITY": self.infinity, "MINUS_ONE": MINUS_ONE[width]}
        if size <= SMALL:
            block = max(1024, triton.next_power_of_2(size))
            launching.launch(
                _select_small, 1, self.scores, size, k, last, bits,
                WIDTH=width, BLOCK=block, **constants,
            )  # fmt: skip
        else:
            self._select(k, last, bits, constants)
        value, threshold = bits.view(self.wide).unbind()
        return Cutoff(value, last[0], threshold)

    def _select(self, k: Tensor, last: Tensor, bits: Tensor, constants: dict[str, int]) -> None:
        digits = DIGITS[torch.iinfo(self.integer).bits]
        with _workspace(self.scores.device) as space:
            shift = sum(digits)
            for digit in digits:
                shift -= digit
                self._count(k, space, shift, digit, descends=True)
            launching.launch(
                _find_tie, self._programs, self.scores, self.scores.numel(), k, space, last, bits,
                BLOCK=BLOCK, STATE=STATE, MOST_PROGRAMS=MOST_PROGRAMS, **constants,
            )  # fmt: skip

    def _count(self, k: Tensor, space: Tensor, shift: int, width: int, descends: bool) -> None:
        first = shift + width == torch.iinfo(self.integer).bits - 1
        launching.launch(
            _count_digits, self._programs, self.scores, self.scores.numel(), k, space,
            SHIFT=shift, WIDTH=width, FIRST=first, DESCENDS=descends, INFINITY=self.infinity,
            BLOCK=BLOCK, STATE=STATE,
        )  # fmt: skip

    @property
    def _programs(self) -> int:
        return max(1, min(PROGRAMS, triton.cdiv(self.scores.numel(), BLOCK)))


_workspaces: dict[tuple[torch.device, int, int], Tensor] = {}


@contextmanager
def _workspace(device: torch.device) -> Iterator[Tensor]:
    """Within it, counts and state that are zero; the passes leave zeros again.

    It is kept per stream and thread, so no two selections use it at a time. A captured graph has
    its own, since it may be replayed on another stream.
    """
    size, key = STATE + MOST_BINS, (device, 0, threading.get_ident())
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            yield torch.zeros(size, dtype=torch.int64, device=device)
            return
        key = (device, torch.cuda.current_stream(device).cuda_stream, key[2])
    if (space := _workspaces.pop(key, None)) is None:
        space = torch.zeros(size, dtype=torch.int64, device=device)
    yield space
    _workspaces[key] = space  # not after an error, which may leave counts
