"""Spartan: weights times a soft top-k mask that is 0 on pruned weights and is differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import devices
from ...allocation import Allocation
from ...context import MethodContext
from ...errors import ConfigurationError
from ...gradient_rules import StraightThrough
from ...operators import Hard
from ...schedules import Linear, count_steps
from ...weights import plain
from ...weights.kept import keep_nonzero
from ...weights.latent import LatentWeights, PerTensor, blocks, sum_blocks, write_if
from ...weights.passes import pruned_mask, write_each
from ...weights.segments import Segment, position_of
from ..base import Completion, Gradients, Pruning, Rate
from ..magnitude import MagnitudePruning, Method
from ..options import make_allocation
from .gradient import Flat
from .logits import Line
from .soft_top_k import SoftMasked, SoftTopK, shared_budgets, soft_top_k


def spartan(
    *,
    sparsity: float,
    beta: float = 20.0,
    allocation: str | Allocation = "global",
    end: int | None = None,
    freeze: int | None = None,
) -> SpartanMethod:
    """Return Spartan: a soft top-k mask that sharpens and is frozen in the last fifth of training.

    Source: Tai, Tian and Lim (NeurIPS 2022), and its public code for the schedules.

    Args:
        sparsity: final fraction of zeros.
        beta: inverse temperature from step `freeze` on; it rises linearly from 1. It multiplies
            |w|, so its meaning depends on the scale of the weights. Published: 10 for ResNet-50,
            otherwise 20.
        allocation: as for `feather`; it defines the budgets. With an allocation that ranks
            |w| / c, c is the cost of a weight: `FlopsBiased(gamma=1, example_input=x)` is the
            published one for multiply-adds.
        end: step up to which the sparsity rises linearly; default: a fifth of training.
        freeze: step from which on the mask is constant; default: the last fifth of training.

    Example:
        >>> spartan(sparsity=0.9).beta
        20.0
    """
    return SpartanMethod(beta, make_allocation(allocation), end, freeze)


@dataclass(frozen=True)
class SpartanMethod:
    """The parts of Spartan.

    Attributes:
        beta, allocation, end, freeze: as for `spartan`.

    Raises:
        ConfigurationError: beta is not a positive number, or a step is not an integer.

    Example:
        >>> from torch_feather.allocation import Global
        >>> SpartanMethod(beta=10, allocation=Global(), freeze=80.0)  # doctest: +ELLIPSIS
        SpartanMethod(beta=10.0, allocation=..., end=None, freeze=80)
    """

    beta: float
    allocation: Allocation
    end: int | None = None
    freeze: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.beta, int | float) or not 0 < self.beta < math.inf:
            raise ConfigurationError(f"beta must be a number > 0, got {self.beta!r}.")
        object.__setattr__(self, "beta", float(self.beta))  # 20 and 20.0 are one method
        count_steps(self, "end", "freeze")

    def bind(self, context: MethodContext) -> Spartan:
        """Return the method on one model."""
        total = context.total_steps
        end = max(total // 5, 1) if self.end is None else self.end
        freeze = max(total - total // 5, end) if self.freeze is None else self.freeze
        if not end <= freeze <= total:
            raise ConfigurationError(
                "The mask must be frozen after the target is reached and before training ends: "
                f"end <= freeze <= total_steps, got end={end}, freeze={freeze}, "
                f"total_steps={total}."
            )
        scheduled = Method(Hard(), StraightThrough(1.0), self.allocation, Linear(0, end))
        return Spartan(context, scheduled, self.beta, freeze)


class SoftMasks(NamedTuple):
    """The pruning of Spartan.

    Example:
        >>> from torch import nn
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> pruning = spartan(sparsity=0.5).bind(context).update(weights, torch.tensor(2))
        >>> pruning.threshold, pruning.frozen
        (tensor([2.]), tensor(False))
    """

    mask: list[Tensor] | None
    """m on kept weights and 0 elsewhere, one per weight tensor; None on a CPU until it is frozen:
    the pass that writes the effective weights computes it."""
    threshold: Tensor
    """Magnitude up to which weights were pruned when the mask was made, of shape (tensors,)."""
    frozen: Tensor
    """Whether the masks are constants, 0-dimensional."""
    soft: SoftTopK | None
    """The masks before pruned weights are set to 0; None if the host knows that they are frozen."""
    segments: list[Segment]
    """The scheduled cutoffs."""
    positions: tuple[int, ...]
    """Position of the segment of each weight tensor."""
    lines: list[Line]
    """The soft masks of the segments as numbers, on a CPU."""
    known: dict[int, tuple[int | None, Tensor]]
    """Memory of soft masks, and the versions of the weights of which `pull_back` computed them."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the pruning, without the mask, which lies in the state."""
        own = [t for s in self.segments for t in (*s.cutoff, s.scale) if t is not None]
        return [self.threshold, self.frozen, *(self.soft or ()), *own]


class Spartan(MagnitudePruning):
    """u = w m on kept weights, with m the soft top-k mask around the scheduled cutoff.

    The gradient passes straight through the hard threshold, but not through the mask. With v = |w|,
    g = dL/du and G = g w,

        dL/dw = g m + sign(w) beta m (1 - m) (G / c - X),   X = sum G m (1 - m) / sum c m (1 - m)

    for all weights. The sums run over all weights that share a budget, so X is added in `complete`.
    (The paper has k - sum c m^2 for the latter sum; the two are equal.) A frozen mask is a
    constant, 0 on pruned weights: dL/dw = g m.

    State: `mask`, `threshold` and `frozen` of the present pruning, see `SoftMasks`; on a CPU,
    `mask` is 1 until it is frozen. On a CPU, `shift` is mu of the step before, infinite if unknown,
    and `drift` its last change, by weight tensor: a search begins at their sum.

    Args:
        context: the model, its prunable weights, the target and the number of steps.
        method: operator, gradient rule, allocation and schedule of the hard cutoff.
        beta: final inverse temperature.
        freeze: step from which on the mask is constant.

    Example:
        >>> from torch import nn
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> bound = spartan(sparsity=0.5).bind(context)
        >>> u = torch.empty_like(weights.views[0])
        >>> bound.write_effective(weights, bound.update(weights, torch.tensor(2)), [u])
        >>> u / weights.views[0]
        tensor([[0.0000, 0.0000, 0.9466, 0.9998]])
    """

    keeps_zeros = False  # soft masks at the budget of a sparse start would shrink all weights

    def __init__(self, context: MethodContext, method: Method, beta: float, freeze: int):
        super().__init__(context, method)
        self.beta, self.freeze = beta, freeze
        weights, n = context.weights, len(context.weights.views)
        self.state |= {
            "mask": weights.per_weight(1.0),
            "threshold": PerTensor.of(torch.zeros(n, dtype=weights.wide, device=weights.device)),
            "frozen": PerTensor.of(torch.zeros(n, dtype=torch.bool, device=weights.device)),
        }
        searched = {
            "shift": PerTensor.of(self.state["threshold"].flat + torch.inf),
            "drift": PerTensor.of(torch.zeros(n, dtype=weights.wide, device=weights.device)),
        }
        self.state |= searched
        self.facts = replace(
            self.facts,
            pulls_back=True,
            completes=True,
            on_shards=False,
            stored=("mask", "threshold", "frozen"),
            absent={name: entry.clone() for name, entry in searched.items()},
        )

    @property
    def fingerprint(self) -> str:
        return f"spartan {self.beta} {self.freeze} {super().fingerprint}"

    # The mask

    def update(self, weights: LatentWeights, step: Tensor) -> Pruning:
        done = step >= self.freeze
        stays, masks = self.state["frozen"].flat & done, self.state["mask"].rows
        threshold = self.state["threshold"].flat
        read = not devices.synchronizes(weights.device)
        if read and stays.all():
            return SoftMasks(masks, threshold, done, None, [], (), [], {})
        segments = self.cutoffs(weights, step)
        beta = 1 + (self.beta - 1) * (step.double() / self.freeze).clamp(max=1)
        positions = tuple(position_of(weights, segments, i) for i in range(len(weights.views)))
        start = beta.new_full((len(segments),), torch.inf)
        last = self.state["shift"].flat.double() + self.state["drift"].flat
        start[list(positions)] = last  # equal within a segment
        soft = soft_top_k(weights, segments, beta, start)
        found = torch.stack([segments[j].threshold for j in positions])
        if read and not done:
            lines = [soft.line(j) for j in range(len(segments))]
            return SoftMasks(None, found, done, soft, segments, positions, lines, {})
        new = _masks(weights, segments, soft, positions)
        if not read or stays.any():  # states of several optimizers are loaded one after another
            new = [torch.where(*pair) for pair in zip(stays, masks, new, strict=True)]
            found = torch.where(stays, threshold, found)
        return SoftMasks(new, found, done, soft, segments, positions, [], {})

    def write_effective(
        self, weights: LatentWeights, pruning: Pruning, out: Sequence[Tensor]
    ) -> None:
        if pruning.mask is not None:
            write_each(weights, _write_effective, out, pruning.mask)
            return
        operators = [SoftMasked(pruning.soft, j) for j in range(len(pruning.segments))]
        plain.write_effective(weights, pruning.segments, operators, out)

    def pruned(self, weights: LatentWeights, pruning: Pruning, i: int) -> Tensor:
        if pruning.mask is None:
            return pruned_mask(weights, pruning.segments, i)
        return pruning.mask[i] == 0

    def after_step(
        self,
        weights: LatentWeights,
        pruning: Pruning,
        gradients: Gradients,
        step: Tensor,
        lr: Rate,
        taken: bool | Tensor,
    ) -> None:
        super().after_step(weights, pruning, gradients, step, lr, taken)
        if pruning.mask is None:  # on a CPU, before it is frozen
            shift, drift = (self.state[name].flat for name in ("shift", "drift"))
            found = pruning.soft.shift[list(pruning.positions)]
            change = found - shift
            change = torch.where(change.isfinite(), change, 0.0)
            write_if(taken, [shift, drift], [found, change])

    def threshold(self, weights: LatentWeights, pruning: Pruning, i: int) -> Tensor:
        return pruning.threshold[i]

    # Gradients

    def _memory(self, weights: LatentWeights, pruning: SoftMasks, i: int) -> tuple[Tensor, bool]:
        """Return memory for the soft mask m of tensor i, and whether it holds m.

        It holds m once, after `pull_back`: `complete` changes the memory.
        """
        known = pruning.known
        if i not in known:  # one piece of memory is faster than many
            rows = weights.per_weight(None).rows
            known.update({k: (None, row) for k, row in enumerate(rows) if k not in known})
        version, memory = known.pop(i)
        on_device = devices.synchronizes(weights.device)
        return memory, version == weights.views[i]._version and not on_device

    def _soft_mask(self, pruning: SoftMasks, i: int, known: bool) -> Callable[..., None]:
        """Return a function that writes m of a block of tensor i; its arguments: w, mask, m."""
        soft, j = pruning.soft, pruning.positions[i]
        assert soft is not None

        def write(w: Tensor, mask: Tensor, m: Tensor) -> None:
            if not known:
                soft.mask(w.abs().to(m.dtype), j, out=m)
            if devices.synchronizes(w.device):
                m.copy_(torch.where(pruning.frozen, mask, m))

        return write

    def _rate(self, weights: LatentWeights, pruning: SoftMasks, i: int) -> Tensor:
        """Return beta / c of tensor i, or 0 if the masks are constants; 0-dimensional."""
        assert pruning.soft is not None
        rate = pruning.soft.beta * pruning.soft.scale[pruning.positions[i]]
        return rate.masked_fill(pruning.frozen, 0.0)

    def pull_back(
        self, weights: LatentWeights, pruning: Pruning, i: int, gradient: Tensor, effective: Tensor
    ) -> Tensor:
        """Return g m + sign(w) beta m (1 - m) g w / c, for pruned weights too."""
        if not devices.synchronizes(weights.device) and pruning.frozen:
            return (gradient * pruning.mask[i]).to(gradient.dtype)
        out, latent = torch.empty_like(gradient), weights.views[i]
        memory, known = self._memory(weights, pruning, i)
        pruning.known[i] = latent._version, memory
        flat = Flat.of(latent, memory, gradient, out)
        if flat is not None:
            flat.pull_back(pruning.lines[pruning.positions[i]], known)
            return out
        rate, write = self._rate(weights, pruning, i), self._soft_mask(pruning, i, known)
        mask = memory if pruning.mask is None else pruning.mask[i]
        for w, frozen, m, g, target in blocks(latent, mask, memory, gradient, out):
            write(w, frozen, m)
            gain = (1 - m).mul_(w.abs()).mul_(rate).add_(1)
            torch.mul(gain.mul_(m), g, out=target)
        return out

    def complete(
        self,
        weights: LatentWeights,
        pruning: Pruning,
        gradients: Gradients,
        effective: Sequence[Tensor],
        scale: Tensor | None,
    ) -> Completion:
        """Return the cross term X; it is linear in the gradients, so their scale is irrelevant."""
        if not devices.synchronizes(weights.device) and pruning.frozen:
            return Completion()
        soft, positions = pruning.soft, pruning.positions
        sums = torch.zeros(len(pruning.segments), 2, dtype=torch.float64, device=weights.device)
        slopes = []
        for i, (gradient, j) in enumerate(zip(gradients, positions, strict=True)):
            slope, found = self._slopes(weights, pruning, i, gradient)
            slopes.append(slope)
            sums[j, 0] += found[0]
            sums[j, 1] += found[1] / soft.scale[j]
        top, bottom = (shared_budgets(weights, pruning.segments) @ sums).unbind(1)
        # If all m are 0 or 1, X is 0. If gradients overflowed, GradScaler skips the optimizer of
        # those weights, and no other.
        cross = torch.where(bottom > 0, top / bottom, 0.0).nan_to_num_(0.0, 0.0, 0.0)
        cross = (-cross * soft.beta).masked_fill(pruning.frozen, 0.0)
        factors = cross.to(weights.wide)[list(positions)].unbind()
        return Completion(terms=slopes, factors=factors)

    def _slopes(
        self, weights: LatentWeights, pruning: SoftMasks, i: int, gradient: Tensor | None
    ) -> tuple[Tensor, Tensor | tuple[float, float]]:
        """Return sign(w) m (1 - m) of tensor i, and the sums of G m (1 - m) and of m (1 - m)."""
        latent = weights.views[i]
        memory, known = self._memory(weights, pruning, i)
        given = () if gradient is None else (gradient,)
        flat = Flat.of(latent, memory, *given)
        if flat is not None:
            return memory, flat.slopes(pruning.lines[pruning.positions[i]], known)
        rate, write = self._rate(weights, pruning, i), self._soft_mask(pruning, i, known)
        mask = memory if pruning.mask is None else pruning.mask[i]

        def add(w: Tensor, frozen: Tensor, m: Tensor, *g: Tensor) -> Tensor:
            write(w, frozen, m)
            rest = 1 - m
            found = [rest.new_zeros(()), m.mul_(rest).sum()]
            if g:  # g m gain; the sum needs g w m (1 - m)
                change = rest.mul_(w)
                found[0] = change.div_(change.abs().mul_(rate).add_(1)).mul_(g[0]).sum()
            m.mul_(w.sign())
            return torch.stack(found).double()

        return memory, sum_blocks(add, latent, mask, memory, *given)


def _masks(
    weights: LatentWeights, segments: Sequence[Segment], soft: SoftTopK, positions: Sequence[int]
) -> list[Tensor]:
    """Return m of kept weights, and 0 elsewhere, of each weight tensor."""
    masks = weights.per_weight(None).rows
    for i, (w, mask, j) in enumerate(zip(weights.views, masks, positions, strict=True)):
        soft.mask(w.abs().to(weights.wide), j, out=mask)
        mask.masked_fill_(pruned_mask(weights, segments, i), 0.0)
    return masks


def _write_effective(w: Tensor, mask: Tensor, out: Tensor) -> None:
    """Write w m; it is 0 only if the mask or w is."""
    if w.dtype == out.dtype == mask.dtype and not devices.synchronizes(w.device):
        out = out.detach()
        torch.mul(w, mask, out=out)
        if np.array_equal(out.numpy() == 0, mask.numpy() == 0):  # nothing was rounded to 0
            out.add_(0.0)  # -0 becomes 0
            return
    u = keep_nonzero((w * mask).to(w.dtype), w)
    out.copy_(u.masked_fill_(mask == 0, 0.0))
