"""The projection onto a budget: the nearest point with entries in [0, 1] and a limited sum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ... import devices
from ...threads import for_each, scratch
from ...weights.latent import BLOCK, blocks

SAMPLE = 61
"""The search starts at the root for every so many numbers."""
ITERATIONS = 30
"""Evaluations of the sum if the host may not read it; otherwise two or three are needed."""


def project_(x: Tensor, budget: Tensor) -> Tensor:
    """Project flat `x`, in place, onto {0 <= x <= 1, sum x <= budget}; return it.

    The projection is clamp(x - v, 0, 1) with the least v >= 0 for which the sum fits. Source: Zhou
    et al., Effective Sparsification of Neural Networks with Global Sparsity Constraint (CVPR 2021),
    who find v by bisection.

    Args:
        x: float32 or float64, of the order of 1.
        budget: 0-dimensional.

    Example:
        >>> project_(torch.tensor([0.5, 1.0, 1.0]), torch.tensor(1.0))
        tensor([0.0000, 0.5000, 0.5000])
    """
    shift = _shift(x, budget)
    for (block,) in blocks(x):
        block.sub_(shift).clamp_(0.0, 1.0)
    return x


def _shift(x: Tensor, budget: Tensor) -> Tensor:
    """Return the root v of sum clamp(x - v, 0, 1) = budget, or 0 if the sum is less at 0.

    The sum falls with v and is piecewise linear, so Newton's method needs few steps. It starts at
    the root for a sample. A step outside of the proven bracket is replaced by bisection.
    """
    host_reads = not devices.synchronizes(x.device)
    if host_reads and x.numel() <= BLOCK:
        x = x[x > 0]  # all others are 0 at any v
    if x.numel() == 0:
        return x.new_zeros(())
    v = x.new_zeros(())
    if host_reads and x.numel() > BLOCK:
        sample = x[::SAMPLE].contiguous()
        v = _shift(sample, budget * sample.numel() / x.numel())
    low, high = v.new_full((), -1.0), v.new_full((), torch.inf)
    if not host_reads:
        high = _top(x)
    rounding = 4 * torch.finfo(x.dtype).eps
    for _ in range(ITERATIONS):
        kept, falling = _counts(x, v).unbind()
        violation = kept - budget
        above = violation > 0
        low, high = torch.where(above, v, low), torch.where(above, high, v)
        done = (violation.abs() <= rounding * (budget + falling)) | (low >= high)
        done |= (v == 0) & ~above
        if host_reads and done:
            break
        newton = v + violation / falling
        inside = (newton > low) & (newton < high)
        if host_reads and not inside and high == torch.inf:
            high = _top(x)
        following = torch.where(inside, newton, (low + high) / 2).clamp_min(0.0).to(x.dtype)
        v = torch.where(done, v, following)
    return v


def _top(x: Tensor) -> Tensor:
    """Return the least v >= 0 for which no entry of x - v is above 0, 0-dimensional."""
    return x.max().clamp_min(0.0)


def _counts(x: Tensor, v: Tensor) -> Tensor:
    """Return the sum of clamp(x - v, 0, 1), and how many of its terms fall with v, (2,) float64."""
    if devices.synchronizes(x.device):
        terms = (x - v).clamp_(0.0, 1.0)
        falling = ((terms > 0) & (terms < 1)).sum()
        return torch.stack([terms.sum().double(), falling.double()])
    values, shift = x.numpy(), v.numpy()

    def of_block(a: int) -> tuple[float, int]:
        own = values[a : a + BLOCK]
        array = np.subtract(own, shift, out=scratch("values", own.size, own.dtype))
        terms = torch.from_numpy(array).clamp_(0.0, 1.0)
        count = int(np.count_nonzero(array > 0)) - int(np.count_nonzero(array == 1))
        return float(terms.sum()), count

    found = for_each(of_block, range(0, values.size, BLOCK))
    return torch.tensor(found, dtype=torch.float64).sum(0)
