"""Passes over masks and gradients, on a CPU block by block in the cache."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...threads import for_each, scratch
from ...weights.latent import blocks
from ...weights.ranges import flat_arrays
from .random_numbers import write_uniform

# Distance of probabilities from 0 and 1 in logits. At 1, where they start, the formula of the
# gradient is 0/0. The public code's first projection, 21 halvings, leaves them at this distance.
MARGIN = 2.0**-21
BLOCK = 1 << 16
"""Weights at a time on a CPU: they stay in the cache."""


def inside(p: Tensor, out: Tensor | None = None) -> Tensor:
    """Return probabilities away from 0 and 1 by `MARGIN`, so that their logits are finite.

    Args:
        p: probabilities.
        out: memory for the result; None for new memory.

    Example:
        >>> inside(torch.tensor([0.0, 0.5]))
        tensor([4.7684e-07, 5.0000e-01])
    """
    return torch.clamp(p, MARGIN, 1 - MARGIN, out=out)


def draw_on_cpu(
    probability: Tensor, seed: int, position: int, sharpness: float, out: Tensor
) -> None:
    """Write sigmoid(T (logit(pi) + logit(u))) for uniform numbers u.

    NumPy takes a third of the time of PyTorch for logarithms of float32 numbers.

    Args:
        probability: pi, flat, float32 or float64.
        seed: selects the sequence of u.
        position: of the first u in its sequence.
        sharpness: T.
        out: memory for the mask.

    Example:
        >>> out = torch.empty(3)
        >>> draw_on_cpu(torch.tensor([0.0, 0.5, 1.0]), 0, 0, 1.0, out)
        >>> out[0] < 1e-4, out[2] > 1 - 1e-4
        (tensor(True), tensor(True))
    """
    p, mask = probability.numpy(), out.numpy()

    def draw(a: int) -> None:
        part = slice(a, a + BLOCK)
        u = scratch("uniform", mask[part].size, mask.dtype)
        write_uniform(u, seed, position + a)
        q = scratch("inside", u.size, u.dtype)
        inside(torch.from_numpy(p[part]), out=torch.from_numpy(q))
        odds = np.multiply(q, u, out=scratch("odds", u.size, u.dtype))
        np.subtract(1, q, out=q)
        np.subtract(1, u, out=u)
        q *= u
        odds /= q
        np.log(odds, out=odds)
        odds *= sharpness
        torch.sigmoid(torch.from_numpy(odds), out=torch.from_numpy(mask[part]))

    for_each(draw, range(0, mask.size, BLOCK))


def write_gradient(
    out: Tensor, gradient: Tensor, w: Tensor, p: Tensor, m: Tensor, factor: Tensor
) -> None:
    """Write factor dL/dw w (1 - m) / (pi~ (1 - pi~)), with 0 for numbers that are not finite.

    Args:
        out: memory for it, dense.
        gradient: dL/dw.
        w: the latent weights.
        p: pi.
        m: the mask.
        factor: T, 0-dimensional.

    Example:
        >>> out, one = torch.empty(1), torch.ones(1)
        >>> write_gradient(out, one, 3 * one, one / 2, one / 2, torch.tensor(1.0))
        >>> out  # 3 (1 / 2) / (1 / 4)
        tensor([6.])
    """
    arrays = flat_arrays(out, gradient, w, p, m)
    if arrays is None:
        for target, g, own, pi, mask in blocks(out, gradient, w, p, m):
            q = inside(pi)
            target.copy_(g).mul_(own).mul_(1 - mask).div_(q.mul_(1 - q)).mul_(factor)
            target.nan_to_num_(0.0, 0.0, 0.0)
        return
    number = float(factor)

    def write(a: int) -> None:
        result, given, weight, probability, kept = (x[a : a + BLOCK] for x in arrays)
        q = scratch("inside", weight.size, weight.dtype)
        inside(torch.from_numpy(probability), out=torch.from_numpy(q))
        rest = np.subtract(1, q, out=scratch("rest", weight.size, weight.dtype))
        q *= rest
        with np.errstate(all="ignore"):
            np.multiply(given, weight, out=result)
            result *= np.subtract(1, kept, out=rest)
            result /= q
            result *= number
        values = torch.from_numpy(result)
        if not math.isfinite(float(values.sum())):
            values.nan_to_num_(0.0, 0.0, 0.0)

    for_each(write, range(0, arrays[0].size, BLOCK))
