"""The nearest point with entries in [0, 1] whose sum is within a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import devices

ITERATIONS = 30
"""Evaluations of the sum where the host may not look at it; elsewhere about five are needed."""


def project_(x: Tensor, budget: Tensor) -> Tensor:
    """Projects flat `x`, in place, onto {0 <= x <= 1, sum x <= budget}; returns it.

    Source: the projection is clamp(x - v, 0, 1) with the least v >= 0 for which the sum fits
    (Zhou et al., Effective Sparsification of Neural Networks with Global Sparsity Constraint,
    CVPR 2021); they find v by bisection.

    Args:
        x: float32 or float64, of the order of 1, as after a step from within.
        budget: 0-dimensional.
    """
    return x.sub_(_shift(x, budget)).clamp_(0.0, 1.0)


def _shift(x: Tensor, budget: Tensor) -> Tensor:
    """The root v of sum clamp(x - v, 0, 1) = budget, or 0 where the sum is less at 0.

    The sum falls with v and is piecewise linear: Newton's method needs few steps, and where one
    leaves the bracket that earlier sums prove, it is halved instead.
    """
    host_reads = not devices.synchronizes(x.device)
    if host_reads:
        x = x[x > 0]  # all others are 0 at any v
        if x.numel() == 0:
            return x.new_zeros(())
    low, high = torch.zeros_like(x[0]), x.max()
    v, rounding = low, 4 * torch.finfo(x.dtype).eps
    for _ in range(ITERATIONS):
        shifted = x - v
        falling = ((shifted > 0) & (shifted <= 1)).sum()
        excess = shifted.clamp_(0.0, 1.0).sum() - budget
        above = excess > 0
        low, high = torch.where(above, v, low), torch.where(above, high, v)
        done = (excess.abs() <= rounding * (budget + falling)) | (low >= high)
        if host_reads and done:
            break
        newton = v + excess / falling
        inside = (newton > low) & (newton < high)
        following = torch.where(inside, newton, (low + high) / 2).to(x.dtype)
        v = torch.where(done, v, following)
    return v
