"""Passes over many tensors as Triton kernels, one launch each; `triton_passes.py` launches them.

Each program reads a row of a table (`tables.py`). Sums and products are rounded one by one, and
quotients and square roots to nearest, so all forms have the same bits.

Imported for CUDA tensors only, since Triton is not available on every platform of PyTorch.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from .. import roots
from ..selection.triton_kernels import widened

THIRD, START = tl.constexpr(roots.THIRD), tl.constexpr(roots.START)


@triton.jit
def _range(rows, latent, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's row, its latent weights, their number, and offsets in the range."""
    row = rows + tl.program_id(0).to(tl.int64) * WIDTH
    return row, latent + tl.load(row), tl.load(row + 1), tl.arange(0, BLOCK)


@triton.jit
def _pointer(row, number: tl.constexpr, base, latent):
    """Return the pointer to the range of a tensor of list `number`."""
    return (base + tl.load(row + 3 + number)).to(latent.dtype)


@triton.jit(do_not_specialize=["base"])
def copy_ranges(rows, latent, base, READS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy tensors into latent weights, or back.

    Example:
        >>> copy_ranges.fn.__name__
        'copy_ranges'
    """
    row, w, length, i = _range(rows, latent, 4, BLOCK)
    other = _pointer(row, 0, base, latent)
    if READS:
        tl.store(w + i, tl.load(other + i, mask=i < length), mask=i < length)
    else:
        tl.store(other + i, tl.load(w + i, mask=i < length), mask=i < length)


@triton.jit(do_not_specialize=["held", "given"])
def adopt_ranges(rows, latent, held, given, BLOCK: tl.constexpr):
    """Copy held values that differ from the given ones into latent weights.

    Example:
        >>> adopt_ranges.fn.__name__
        'adopt_ranges'
    """
    row, w, length, i = _range(rows, latent, 5, BLOCK)
    inside = i < length
    value = tl.load(_pointer(row, 0, held, latent) + i, mask=inside)
    before = tl.load(_pointer(row, 1, given, latent) + i, mask=inside)
    tl.store(w + i, value, mask=inside & (widened(value) != widened(before)))


@triton.jit
def _cube_root(x):
    """Return the cube root, as in `roots.cube_root`."""
    y = (x.to(tl.int32, bitcast=True) // 3 + START).to(tl.float32, bitcast=True)
    y = y * (2.0 - tl.math.div_rn(3.0, tl.math.div_rn(x, y * y * y) + 2.0))
    y = y + (tl.math.div_rn(x, y * y) - y) * THIRD
    return tl.where(x == 0, x, y)


@triton.jit
def _rounded(x, KIND: tl.constexpr):
    """Return numbers in another type, rounded to nearest even."""
    if tl.bfloat16 == KIND:  # by hand: Triton's interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        top = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        top = tl.where(x == x, top, 0x7FC0)
        return top.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(KIND)


@triton.jit
def _divided(a, b, DOUBLE: tl.constexpr):
    if DOUBLE:
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def _operator(w, tau, P: tl.constexpr, DOUBLE: tl.constexpr):
    """Return the effective values of kept weights, as in `operators.Power`."""
    if P == 1:
        sign = (w > 0).to(w.dtype) - (w < 0).to(w.dtype)
        return w - tau * sign
    else:
        ratio = _divided(tau, tl.abs(w), DOUBLE)
        power = ratio * ratio
        if P == 3:
            power = power * ratio
        rest = 1.0 - power
        rest = tl.where(rest < 0, 0.0, rest)  # NaN stays
        if P == 2:
            root = tl.math.sqrt_rn(rest)
        else:
            root = _cube_root(rest)
        return tl.where(w == 0, w, root * w)


@triton.jit(
    do_not_specialize=["base", "start"], do_not_specialize_on_alignment=["cutoff", "last", "tau"]
)
def write_ranges(
    rows, latent, base, start, cutoff, last, tau, scale, P: tl.constexpr, SCALED: tl.constexpr,
    DOUBLE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write effective weights: 0 for pruned weights, the operator's value for kept ones.

    Example:
        >>> write_ranges.fn.__name__
        'write_ranges'
    """
    row, source, length, i = _range(rows, latent, 4, BLOCK)
    segment = tl.load(row + 2)
    kind = latent.dtype.element_ty
    wide = tl.float64 if DOUBLE else tl.float32
    own = tl.load(source + i, mask=i < length, other=0.0)
    w = widened(own).to(wide)
    score = tl.abs(w)
    if SCALED:
        score = score * tl.load(scale + segment)
    value = tl.load(cutoff + segment)
    tied = (score == value) & (start + tl.load(row) + i <= tl.load(last + segment))
    u = own
    if P > 0:
        u = _rounded(_operator(w, tl.load(tau + segment), P, DOUBLE), kind)
        # A kept weight never vanishes: it takes the smallest number of its type.
        whole = tl.int64 if BITS == 64 else (tl.int32 if BITS == 32 else tl.int16)
        sign = own.to(whole, bitcast=True) & (-1 << (BITS - 1))
        least = (sign | 1).to(whole).to(kind, bitcast=True)
        u = tl.where((widened(u) == 0) & (w != 0), least, u)
    u = tl.where((score < value) | tied, tl.zeros([BLOCK], kind), u)
    tl.store(_pointer(row, 0, base, latent) + i, u, mask=i < length)


@triton.jit(do_not_specialize=["size", "theta"])
def scale_pruned(gradient, effective, cutoff, out, size, theta, BLOCK: tl.constexpr):
    """Write theta times the gradient of pruned weights, and the gradient of kept ones.

    Example:
        >>> scale_pruned.fn.__name__
        'scale_pruned'
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    g = widened(tl.load(gradient + i, mask=inside, other=0.0))
    u = widened(tl.load(effective + i, mask=inside, other=0.0))
    # With a cutoff at 0 or below only zeros are pruned, which count as kept.
    pruned = tl.where(tl.load(cutoff) <= 0, 1.0, theta)
    factor = tl.where(u != 0, 1.0, pruned)
    result = _rounded(g * factor, gradient.dtype.element_ty)
    tl.store(out + i, result, mask=inside)
