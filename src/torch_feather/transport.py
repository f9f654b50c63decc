"""Soft top-k: a mask between 0 and 1 of a given cost, the largest values first.

    m = sigmoid(beta (v / c - h) + mu),    with mu such that sum c m = k

for values v >= 0, costs c > 0, the hard threshold h of v / c and the cost k of what lies above it.
This is the optimal transport of a mass k to places of capacity c, regularised by entropy; for
beta -> infinity it is the hard top-k. Source: Tai, Tian and Lim, Spartan (NeurIPS 2022), section 3.
They iterate Sinkhorn's updates, of which the root mu is the fixed point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import host
from .latent import BLOCK, DEVICE_BLOCK, LatentWeights, Segment

PASSES = 16
"""Most evaluations of sum c m in one solution; three to five are usual, see `_root`."""
SATURATED = 100.0
"""A logit at which m is 1 for every mu in question, for values that are NaN."""


class SoftTopK(NamedTuple):
    """The soft masks of several segments of the weights; the last three have an entry for each.

    Segments that share one cut share one budget.
    """

    beta: Tensor
    """Inverse temperature, 0-dimensional."""
    scale: Tensor
    """1 / c."""
    threshold: Tensor
    """h, the largest v / c below the cut."""
    shift: Tensor
    """mu; infinite where a segment is kept, or pruned, as a whole."""

    def logits(self, magnitudes: Tensor, j: int) -> Tensor:
        """beta (v / c - h) of values in segment j, of any shape, as a new tensor."""
        x = (magnitudes * self.scale[j]).sub_(self.threshold[j]).mul_(self.beta)
        return x.nan_to_num_(nan=SATURATED)

    def mask(self, magnitudes: Tensor, j: int) -> Tensor:
        """m of values in segment j, of any shape, as a new tensor."""
        return self.logits(magnitudes, j).add_(self.shift[j]).sigmoid_()


def soft_top_k(weights: LatentWeights, segments: Sequence[Segment], beta: Tensor) -> SoftTopK:
    """The soft masks around hard cuts through |w| / c; their cost is that of the weights kept.

    Args:
        weights: the latent weights w.
        segments: cover all weights once; `scale` is 1 / c.
        beta: inverse temperature, 0-dimensional.
    """
    one = torch.ones((), dtype=torch.float64, device=weights.device)
    scale = torch.stack([one if s.scale is None else s.scale.double() for s in segments])
    threshold = torch.stack([s.cut.value.double() for s in segments])
    soft = SoftTopK(beta, scale, threshold, torch.zeros_like(scale))
    logits, kept, pruned = [], [], []
    for j, segment in enumerate(segments):
        magnitudes = weights.magnitudes(segment.start, segment.stop)
        below = one.new_zeros(())
        for a in range(0, magnitudes.numel(), block(weights)):
            part = magnitudes[a : a + block(weights)]
            below = below + segment.pruned(part, segment.start + a).sum()
        logits.append(soft.logits(magnitudes, j))
        kept.append(magnitudes.numel() - below)
        pruned.append(below)
    cost = 1 / scale
    same = sharing(weights, segments)
    shift = _root(logits, cost, same, torch.stack(kept), torch.stack(pruned), block(weights))
    return soft._replace(shift=shift)


def sharing(weights: LatentWeights, segments: Sequence[Segment]) -> Tensor:
    """Which segments share a cut: 1.0 or 0.0, of shape (segments, segments)."""
    first: dict[int, int] = {}
    groups = tuple(first.setdefault(id(s.cut), j) for j, s in enumerate(segments))

    def make(weights: LatentWeights) -> Tensor:
        group = torch.tensor(groups, device=weights.device)
        return (group[:, None] == group).double()

    return weights.constant(("sharing", groups), make)


def block(weights: LatentWeights) -> int:
    """Weights to look at together."""
    return DEVICE_BLOCK if host.waits_for(weights.device) else BLOCK


def _root(
    logits: Sequence[Tensor],
    cost: Tensor,
    same: Tensor,
    kept: Tensor,
    pruned: Tensor,
    block: int,
) -> Tensor:
    """mu of each segment, such that the sum over its group of c sigmoid(x + mu) is that of c kept.

    Newton's method on the logit of the share, which is nearly linear in mu, where it stays in the
    bracket, and bisection elsewhere. As x = 0 at the largest pruned value, the root lies below
    log(2 sum c / min c), and where it lies 40 below minus that, the sum there is the same to
    rounding. Each evaluation is a pass over the weights.

    Args:
        logits: x, one flat tensor for each segment.
        cost: c of each segment.
        same: see `sharing`.
        kept, pruned: numbers of weights of each segment, float64.
        block: weights to look at together.
    """
    budget, rest = same @ (cost * kept), same @ (cost * pruned)
    total = budget + rest
    target = (budget / total).logit()
    trivial = (budget == 0) | (rest == 0)
    bound = (2 * total / torch.where(same > 0, cost, torch.inf).amin(1)).log()
    low, high = -bound - 40, bound
    close = torch.finfo(logits[0].dtype).eps ** 0.5  # the next step would be its square
    mu = torch.zeros_like(total)
    for _ in range(PASSES):
        sums = torch.stack([_sums(x, mu[j], block) for j, x in enumerate(logits)])
        reached, slope = same @ (cost * sums[:, 0]), same @ (cost * sums[:, 1])
        share = reached / total
        step = (share.logit() - target) * share * (1 - share) * total / slope
        step = torch.where(trivial | (reached == budget), 0.0, step)
        low = torch.where(reached < budget, mu, low)
        high = torch.where(reached > budget, mu, high)
        newton, near = mu - step, step.abs() <= close
        inside = (newton > low) & (newton < high)
        mu = torch.where(near | inside, newton, (low + high) / 2)
        if not host.waits_for(mu.device) and bool(near.all()):
            break
    return torch.where(trivial, target, mu)


def _sums(x: Tensor, mu: Tensor, block: int) -> Tensor:
    """The sums of m and of m (1 - m), float64 of shape (2,)."""
    total = x.new_zeros(2, dtype=torch.float64)
    for part in x.split(block):
        m = (part + mu).sigmoid_()
        pair = m.sum(dtype=torch.float64), (m * (1 - m)).sum(dtype=torch.float64)
        total = total + torch.stack(pair)
    return total
