"""Soft top-k: a mask between 0 and 1 of a given cost, the largest values first.

    m = sigmoid(beta (v / c - h) + mu),    with mu such that sum c m = k

for values v >= 0, costs c > 0, the hard threshold h of v / c, and the cost k of the values above h.
This is the optimal transport of a mass k to bins of capacity c, regularized by entropy; for
beta -> infinity it is the hard top-k. Source: Tai, Tian and Lim, Spartan (NeurIPS 2022), section 3.
They iterate Sinkhorn's updates, whose fixed point is the root mu.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ... import devices
from ...operators import Operator
from ...weights.latent import LatentWeights
from ...weights.segments import Segment, first_with_cutoff
from .logits import SATURATED, KeptLogits, Line, StoredLogits

PASSES = 16
"""Maximum number of passes over the weights per solution of mu; one to three are usual."""


class SoftTopK(NamedTuple):
    """The soft masks of several segments; all fields but the first have an entry per segment.

    Segments that share a cutoff share a budget.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> soft = SoftTopK(torch.tensor(1.0), scale=one, threshold=2 * one, shift=0 * one)
        >>> soft.mask(torch.tensor([1.0, 2.0, 3.0]), 0)
        tensor([0.2689, 0.5000, 0.7311])
    """

    beta: Tensor
    """Inverse temperature, 0-dimensional."""
    scale: Tensor
    """1 / c."""
    threshold: Tensor
    """h, the largest v / c below the cutoff."""
    shift: Tensor
    """mu; infinite if a segment is entirely kept or entirely pruned."""

    def line(self, j: int) -> Line:
        """Return the logits of segment j as numbers, if the host may read them."""
        own = (float(x[j]) for x in (self.scale, self.threshold, self.shift))
        return Line(float(self.beta), *own)

    def logits(self, magnitudes: Tensor, j: int, out: Tensor | None = None) -> Tensor:
        """Return beta (v / c - h) of values in segment j.

        Args:
            magnitudes: v, of any shape.
            j: position of the segment.
            out: memory for the result, of type `wide`; None for new memory.
        """
        x = torch.mul(magnitudes, self.scale[j], out=out)
        return x.sub_(self.threshold[j]).mul_(self.beta).nan_to_num_(nan=SATURATED)

    def mask(self, magnitudes: Tensor, j: int, out: Tensor | None = None) -> Tensor:
        """Return m; arguments as for `logits`."""
        if devices.synchronizes(magnitudes.device):
            return self.logits(magnitudes, j, out=out).add_(self.shift[j]).sigmoid_()
        out = torch.empty_like(magnitudes) if out is None else out
        self.line(j).mask(magnitudes.numpy(), out.numpy())
        return out


@dataclass(frozen=True)
class SoftMasked(Operator):
    """w m: the effective values of the kept weights of a segment.

    Attributes:
        soft: the soft masks.
        j: position of the segment.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> soft = SoftTopK(torch.tensor(1.0), scale=one, threshold=2 * one, shift=0 * one)
        >>> SoftMasked(soft, 0)(torch.tensor([2.0]), torch.tensor(2.0))
        tensor([1.])
    """

    soft: SoftTopK
    j: int

    def __call__(self, w: Tensor, tau: Tensor) -> Tensor:
        return self.soft.mask(w.abs(), self.j).mul_(w)


def soft_top_k(
    weights: LatentWeights,
    segments: Sequence[Segment],
    beta: Tensor,
    start: Tensor | None = None,
) -> SoftTopK:
    """Return the soft masks around cutoffs through |w| / c; their cost is that of the kept weights.

    Args:
        weights: the latent weights w.
        segments: cover all weights once, in their order; `scale` is 1 / c.
        beta: inverse temperature, 0-dimensional.
        start: where the search of mu begins on a CPU, of each segment; infinite if unknown: then it
            begins at the solution for a sample. It changes the result by rounding only.

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([1.0, 2.0, 3.0, 4.0])])
        >>> cutoff = Cutoff(torch.tensor(2.0), torch.tensor(3), torch.tensor(2.0))
        >>> soft = soft_top_k(weights, [Segment(0, 4, cutoff)], torch.tensor(1.0))
        >>> float(soft.mask(weights.magnitudes(), 0).sum().round(decimals=3))  # 2 weights are kept
        2.0
    """
    one = torch.ones((), dtype=torch.float64, device=weights.device)
    scale = torch.stack([one if s.scale is None else s.scale.double() for s in segments])
    threshold = torch.stack([s.cutoff.value.double() for s in segments])
    soft = SoftTopK(beta, scale, threshold, torch.zeros_like(scale))
    cost, same = 1 / scale, shared_budgets(weights, segments)
    if devices.synchronizes(weights.device):
        stored = StoredLogits.of(weights, segments, soft.logits)
        return soft._replace(shift=_root(stored, cost, same, weights.wide))
    kept = KeptLogits(weights, segments, [soft.line(j) for j in range(len(segments))])
    if start is None:
        start = torch.full_like(scale, torch.inf)
    searched = (same @ (cost[:, None] * kept.counts)).prod(1) > 0  # neither is 0
    if (searched & start.isinf()).any():
        found = _root(kept.sample(), cost, same, weights.wide)
        start = torch.where(start.isinf(), found, start)
    return soft._replace(shift=_root(kept, cost, same, weights.wide, start))


def shared_budgets(weights: LatentWeights, segments: Sequence[Segment]) -> Tensor:
    """Return 1.0 for pairs of segments that share a cutoff, else 0.0.

    Args:
        weights: the latent weights.
        segments: cover all weights once.

    Returns:
        float64 of shape (segments, segments).

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([1.0, 2.0, 3.0, 4.0])])
        >>> cutoff = Cutoff(torch.tensor(2.0), torch.tensor(3), torch.tensor(2.0))
        >>> shared_budgets(weights, [Segment(0, 2, cutoff), Segment(2, 4, cutoff)]).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    groups = first_with_cutoff(segments)

    def make(weights: LatentWeights) -> Tensor:
        group = torch.tensor(groups, device=weights.device)
        return (group[:, None] == group).double()

    return weights.constant(("shared budgets", groups), make)


def _root(
    logits: StoredLogits | KeptLogits,
    cost: Tensor,
    same: Tensor,
    dtype: torch.dtype,
    start: Tensor | None = None,
) -> Tensor:
    """Return mu of each segment, the root of

        sum of c m over pruned weights = sum of c (1 - m) over kept weights

    with sums over the segments that share a budget. Newton's method is applied to the difference of
    their logarithms. It is linear in mu if all logits are equal, or if a gap separates kept and
    pruned weights. Steps that leave the bracket are replaced by bisection. Each evaluation is a
    pass over the weights.

    Logits are 0 at the largest pruned value, so the root lies below log(2 sum c / min c). More than
    40 below minus that bound, the sums are 0 to rounding.

    Args:
        logits: beta (v / c - h).
        cost: c of each segment, float64.
        same: which segments share a budget, from `shared_budgets`.
        dtype: type of the logits.
        start: where the search begins; None for 0.
    """
    pruned, kept = (same @ (cost[:, None] * logits.counts)).unbind(1)
    trivial = (kept == 0) | (pruned == 0)
    bound = (2 * (kept + pruned) / torch.where(same > 0, cost, torch.inf).amin(1)).log()
    low, high, mu = -bound - 40, bound, torch.zeros_like(bound)
    if start is not None:
        mu = torch.where((start > low) & (start < high), start, mu)
    eps = torch.finfo(dtype).eps
    for _ in range(PASSES):
        # Both sides of the equation, and the absolute values of their derivatives.
        sums = same @ (cost[:, None] * logits.sums(mu))
        left, left_slope, right, right_slope = sums.unbind(1)
        step = (left / right).log() / (left_slope / left + right_slope / right)
        exact = trivial | (torch.maximum(left, right) <= eps * kept)
        step = step.masked_fill(exact, 0.0)
        low, high = torch.where(left < right, mu, low), torch.where(left > right, mu, high)
        newton, near = mu - step, step.abs() <= eps**0.5  # the next step would be its square
        inside = (newton > low) & (newton < high)
        mu = torch.where(near | inside, newton, (low + high) / 2)
        if not devices.synchronizes(mu.device) and bool(near.all()):
            break
    return torch.where(trivial, (kept / (kept + pruned)).logit(), mu)
