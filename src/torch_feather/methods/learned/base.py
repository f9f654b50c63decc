"""Methods that learn their thresholds: one parameter per weight tensor, stepped with the weights.

Such a method hits no target by itself. At the end of training, from the last step on or earlier,
the count is made exact: weights are ranked by |w| / tau over the whole network, and the round(s N)
lowest are pruned. So what is evaluated after that step, saved, and finalized is one model. Where
the schedule arrives later, it is from its arrival on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ... import devices
from ...errors import ConfigurationError
from ...gradient_rules import GradientRule
from ...operators import Operator
from ...schedules import Schedule
from ...selection import Cut
from ...weights.latent import LatentWeights, Segment, copy_all
from ...weights.shards import local
from ..base import Rate, Setting
from ..own_parameters import Momentum
from ..thresholded import Thresholded, Timetable


class Law(Protocol):
    """How the thresholds tau follow from the learned parameters r, one of each per tensor."""

    @property
    def unit(self) -> str:
        """What r is, for checkpoints; laws that mean the same by it may take over each other's."""

    def start(self, weights: LatentWeights, sparsity: float) -> float:
        """r of all tensors before training."""

    def thresholds(self, r: Tensor, weights: LatentWeights) -> tuple[Tensor, Tensor]:
        """tau >= 0 and d tau / d r, each of the shape of r, (number of tensors,)."""

    def penalty(self, r: Tensor, weights: LatentWeights, now: Present) -> Tensor:
        """The gradient in r of what the method adds to the loss, of the shape of r.

        Args:
            r: the parameters.
            weights: the latent weights; `sizes` has their counts.
            now: where the method stands with them.
        """


class Present(NamedTuple):
    """What a law may want to know of the present, one entry for each tensor.

    Attributes:
        dense: mask of the tensors that stay dense, where r means nothing.
        slope: d tau / d r, as `Law.thresholds` found it.
        kept: counts the weights beyond their thresholds (all of dense tensors).
        sparsity: wanted now, 0-dimensional float64.
    """

    dense: Tensor
    slope: Tensor
    kept: Callable[[], Tensor]
    sparsity: Tensor


@dataclass(frozen=True)
class LearnedMethod:
    """Operator and gradient rule at thresholds that are learned; `repr` is its identity.

    Attributes:
        operator, gradient: as for `Method`.
        law: what the learned parameters mean, and their penalty.
        optimizer: how they step.
        schedule: the sparsity that is wanted over time.
        dense_below: tensors of fewer weights than this stay dense.
        exact_from: share of training after which the count is made exact; None: never, the end is
            what the method reaches by itself.
    """

    operator: Operator
    gradient: GradientRule
    law: Law
    optimizer: Momentum
    schedule: Schedule
    dense_below: int = 0
    exact_from: float | None = 1.0

    def attach(self, setting: Setting) -> LearnedThresholds:
        """Puts the method to work."""
        return LearnedThresholds(setting, self)


class _Solved(NamedTuple):
    """What a `refresh` finds: the sparsity wanted now, thresholds, their derivative in r, and the
    cut through |w| / tau."""

    wanted: Tensor
    tau: Tensor
    slope: Tensor
    scale: Tensor
    cut: Cut

    def tensors(self) -> list[Tensor]:
        return [*self[:-1], *self.cut]

    def segments(self, weights: LatentWeights) -> list[Segment]:
        pairs = zip(weights.spans, self.scale, strict=True)
        return [Segment(start, stop, self.cut, scale) for (start, stop), scale in pairs]


class LearnedThresholds(Thresholded):
    """A `LearnedMethod` at work: the cut is at |w| / tau = 1, until the count is made exact."""

    completes = True
    follows_rate = True
    # Their gradients are sums over layers, with steep penalties: in one norm with them the weights
    # might be left no step.
    clips_own = False
    on_shards = True

    def __init__(self, setting: Setting, method: LearnedMethod):
        super().__init__(setting, method.operator, method.gradient)
        self.method = method
        self.timetable = Timetable(method.schedule, setting)
        begin = 1.0 if method.exact_from is None else method.exact_from
        self.exact = method.exact_from is not None
        self.arrival = max(math.ceil(begin * setting.total_steps), self.timetable.arrival)
        weights, sizes = setting.weights, [shape.numel() for shape in setting.weights.shapes]
        most = sum(n for n in sizes if n >= method.dense_below)
        if round(setting.sparsity * weights.size) > most:
            raise ConfigurationError(
                f"sparsity={setting.sparsity} asks for {round(setting.sparsity * weights.size)} "
                f"zeros, but only {most} of {weights.size} weights are in tensors of at least "
                f"dense_below={method.dense_below}. Lower dense_below or the target."
            )
        start = method.law.start(weights, setting.sparsity)
        r = torch.full((len(sizes),), start, dtype=weights.wide, device=weights.device)
        unit = method.law.unit
        self.state = {unit: r, f"{unit}_velocity": torch.zeros_like(r)}
        self.learned = (unit,)
        self._solved: _Solved | None = None

    @property
    def identity(self) -> str:
        """See `Reparametrization`."""
        return f"{self.method!r} {self.timetable.identity}"

    @property
    def r(self) -> Tensor:
        """The learned parameters, one for each weight tensor."""
        r = self.state[self.method.law.unit]
        assert isinstance(r, Tensor)
        return r

    # Thresholds

    def refresh(self, weights: LatentWeights, step: Tensor) -> None:
        """See `Reparametrization`."""
        solved = self._solve(weights, step)
        if self._solved is None:
            self._solved = solved
            self.segments = solved.segments(weights)
        else:
            copy_all(self._solved.tensors(), solved.tensors())

    def cuts(self, weights: LatentWeights, step: Tensor) -> list[Segment]:
        """See `Thresholded`."""
        return self._solve(weights, step).segments(weights)

    def _solve(self, weights: LatentWeights, step: Tensor) -> _Solved:
        tau, slope = self.method.law.thresholds(self.r, weights)
        wanted, scale = self.timetable.at(step), self.scale(tau, weights)
        cut = _own_cut(weights)
        if self.exact:
            done = step >= self.arrival
            if devices.synchronizes(weights.device):
                exact = self.cut_at(wanted, scale, weights)
                cut = Cut(*(torch.where(done, a, b) for a, b in zip(exact, cut, strict=True)))
            elif done:
                cut = self.cut_at(wanted, scale, weights)
        return _Solved(wanted, tau, slope, scale, cut)

    def scale(self, tau: Tensor, weights: LatentWeights) -> Tensor:
        """1 / tau, by which magnitudes are ranked; infinite where a tensor stays dense."""
        scale = 1 / tau.clamp_min(torch.finfo(weights.wide).tiny)
        return scale.masked_fill(self._is_dense(weights), torch.inf).to(weights.wide)

    def cut_at(self, sparsity: Tensor, scale: Tensor, weights: LatentWeights) -> Cut:
        """The cut that prunes exactly the lowest round(s N) of |w| times scale."""
        k = (sparsity * weights.size).round().long()
        return weights.select(k, list(scale))

    def _is_dense(self, weights: LatentWeights) -> Tensor:
        """Mask of the tensors that stay dense."""
        return weights.sizes < self.method.dense_below

    def own_counts_pruned(self, weights: LatentWeights) -> Tensor:
        """See `Reparametrization`."""
        assert self._solved is not None
        own = self._solved._replace(cut=_own_cut(weights))
        return weights.counts_pruned(own.segments(weights))

    def broken(self, weights: LatentWeights) -> Tensor:
        """See `Reparametrization`. Such a tensor's scores are NaN, and NaN is kept."""
        assert self._solved is not None
        finite = self._solved.tau.isfinite() & self.r.isfinite()
        return ~(finite | self._is_dense(weights))

    # Gradients

    def complete(
        self, weights: LatentWeights, parameters: Sequence[nn.Parameter], scale: Tensor | None
    ) -> None:
        """dL/dtau = sum of dL/dw (u - w) / tau over a tensor, with dL/dw after the gradient rule.

        An operator scales with its threshold, u = tau f(w / tau), so du/dtau = f - f' w / tau.
        Straight through, f' counts as 1, which leaves (u - w) / tau; for the soft threshold that
        is the true derivative. Source: ASL's gradient is the case u = w on kept weights.
        """
        assert self._solved is not None
        wanted, tau, slope, *_ = self._solved
        sums = []
        for i, (parameter, w) in enumerate(zip(parameters, weights.views, strict=True)):
            if parameter.grad is None:
                sums.append(tau.new_zeros(()))
            else:
                change = self._unrounded(weights, i, local(parameter).detach()) - w
                sums.append((change * local(parameter.grad)).sum(dtype=weights.wide))
        # Where gradients overflowed, GradScaler skips the optimizer of those weights, and no other.
        total = weights.total(torch.stack(sums)).nan_to_num_(0.0, 0.0, 0.0)
        gradient = total * torch.where(tau > 0, slope / tau, 0.0)
        if scale is not None:
            gradient /= scale
        dense = self._is_dense(weights)
        present = Present(
            dense, slope, lambda: weights.sizes - self.own_counts_pruned(weights), wanted
        )
        gradient += self.method.law.penalty(self.r, weights, present)
        self.r.grad = gradient.masked_fill(dense, 0.0).to(self.r.dtype)

    def _unrounded(self, weights: LatentWeights, i: int, image: Tensor) -> Tensor:
        """The image of tensor i before it took its type.

        Where a threshold is small beside the weights, u - w is less than half precision rounds by.
        """
        if image.dtype == weights.wide:
            return image
        wide = weights.views[i].to(weights.wide)
        if not self.operator.is_identity:
            wide = self.operator(wide, self.threshold(weights, i))
        return wide.masked_fill(image == 0, 0.0)

    def advance(
        self, weights: LatentWeights, step: Tensor, rate: Rate, taken: bool | Tensor
    ) -> None:
        """See `Reparametrization`."""
        velocity = self.state[f"{self.method.law.unit}_velocity"]
        assert isinstance(velocity, Tensor)
        self.method.optimizer.step(self.r, velocity, rate, taken)

    def move(self, weights: LatentWeights) -> None:
        """See `Reparametrization`."""
        super().move(weights)
        self.timetable.move(weights.device)
        self._solved = None


def _own_cut(weights: LatentWeights) -> Cut:
    """Prunes scores up to 1."""
    one = torch.ones((), dtype=weights.wide, device=weights.device)
    last = torch.full((), weights.size - 1, device=weights.device)
    return Cut(one, last, one.clone())  # they part when the count is made exact
