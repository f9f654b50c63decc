"""Methods that learn their thresholds: one parameter per weight tensor, stepped with the weights.

Such a method does not reach a target exactly. In the last phase of training, or at the last step,
the count is made exact: weights are ranked by |w| / tau over the whole network, and the round(s N)
lowest are pruned. If the schedule ends later than that, the exact count starts there. So the models
that are evaluated, saved and finalized are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ... import devices
from ...context import MethodContext
from ...errors import ConfigurationError
from ...gradient_rules import GradientRule
from ...operators import Operator
from ...prunable import convolutions
from ...scalars import count_of
from ...schedules import Schedule
from ...selection import Cutoff
from ...weights.latent import LatentWeights, PerTensor
from ...weights.passes import count_pruned
from ...weights.segments import Segment
from ...weights.selecting import select_weights
from ..base import Completion, Gradients, Pruning, Rate, Summary
from ..magnitude import Thresholded, Timetable
from ..own_parameters import Momentum
from .changes import sums_of_changes


class ThresholdParametrization(Protocol):
    """Defines thresholds tau by learned parameters r, one of each per weight tensor.

    Example:
        >>> class Exponential:  # tau = exp(r), without a penalty
        ...     unit = "log"
        ...     def start(self, weights, sparsity):
        ...         return -10.0
        ...     def thresholds(self, r, weights):
        ...         return r.exp(), r.exp()
        ...     def penalty(self, r, weights, now):
        ...         return torch.zeros_like(r)
        >>> law: ThresholdParametrization = Exponential()
        >>> law.thresholds(torch.zeros(2), LatentWeights([torch.ones(3), torch.ones(4)]))[0]
        tensor([1., 1.])
    """

    @property
    def unit(self) -> str:
        """Meaning of r, for checkpoints; parametrizations with one unit can load each other's r."""

    def start(self, weights: LatentWeights, sparsity: float) -> float:
        """Return r of all tensors before training."""

    def thresholds(self, r: Tensor, weights: LatentWeights) -> tuple[Tensor, Tensor]:
        """Return tau >= 0 and d tau / d r, each of the shape of r, (tensors,)."""

    def penalty(self, r: Tensor, weights: LatentWeights, now: Present) -> Tensor:
        """Return the gradient in r of the method's term in the loss, of the shape of r.

        Args:
            r: the parameters.
            weights: the latent weights; `sizes` has their counts.
            now: the present state of the method.
        """


class Present(NamedTuple):
    """The present state of a method, for a penalty; one entry per tensor.

    Attributes:
        dense: mask of the tensors that stay dense; their r is unused.
        slope: d tau / d r, as returned by `ThresholdParametrization.thresholds`.
        kept: counts the weights above their thresholds (all weights of dense tensors).
        sparsity: scheduled sparsity, 0-dimensional float64.
        outside: mask of the dense tensors that do not count in the budget; None for none.

    Example:
        >>> now = Present(
        ...     dense=torch.tensor([False, True]),
        ...     slope=torch.ones(2),
        ...     kept=lambda: torch.tensor([3, 4]),
        ...     sparsity=torch.tensor(0.5, dtype=torch.float64),
        ... )
        >>> now.kept()[~now.dense].tolist()  # kept weights of the tensors with a threshold
        [3]
    """

    dense: Tensor
    slope: Tensor
    kept: Callable[[], Tensor]
    sparsity: Tensor
    outside: Tensor | None = None


@dataclass(frozen=True)
class LearnedMethod:
    """Operator and gradient rule at learned thresholds; its `repr` is part of the fingerprint.

    Attributes:
        operator, gradient: as for `Method`.
        law: meaning of the learned parameters, and their penalty.
        optimizer: optimizer of the learned parameters.
        schedule: the target sparsity over time.
        dense_below: tensors of fewer weights stay dense. A convolution with groups counts with the
            weights that it would have without groups, as in ASL's public code. At least 0.
        exact_from: fraction of training after which the count is made exact. None: never; the
            method learns the final sparsity.

    Example:
        >>> from torch_feather.methods import asl
        >>> asl(sparsity=0.9).exact_from
        0.9
    """

    operator: Operator
    gradient: GradientRule
    law: ThresholdParametrization
    optimizer: Momentum
    schedule: Schedule
    dense_below: int = 0
    exact_from: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.dense_below >= 0:
            raise ConfigurationError(f"dense_below must be at least 0, got {self.dense_below!r}.")

    def bind(self, context: MethodContext) -> LearnedThresholds:
        """Return the method on one model."""
        return LearnedThresholds(context, self)


class Learned(NamedTuple):
    """The pruning of a method with learned thresholds; tau and slope have one entry per tensor.

    Example:
        >>> from torch import nn
        >>> from torch_feather.methods import asl
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> bound = asl(sparsity=0.5, dense_below=0).bind(context)
        >>> pruning = bound.update(weights, torch.tensor(5))
        >>> pruning.progress, pruning.tau.shape
        (tensor(0.5000, dtype=torch.float64), torch.Size([1]))
    """

    segments: list[Segment]
    """Cover all weights once; they share one cutoff through |w| / tau."""
    progress: Tensor
    """Completed fraction of training, 0-dimensional float64."""
    target: Tensor
    """Scheduled sparsity, 0-dimensional float64."""
    tau: Tensor
    slope: Tensor
    """d tau / d r."""


class LearnedThresholds(Thresholded):
    """A `LearnedMethod` on one model: the cutoff is at |w| / tau = 1 until the count is exact.

    State: r and its velocity, and `dense` of each tensor: 0 if it is pruned, 2 if it stays dense,
    and 1 if it stays dense and counts in the budget with density 1, as in version 0.1.

    Args:
        context: the model, its prunable weights, the target and the number of steps.
        method: the parts of the method.

    Raises:
        ConfigurationError: the target needs more zeros than there are in prunable tensors.

    Example:
        >>> from torch import nn
        >>> from torch_feather.methods import asl
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> bound = asl(sparsity=0.5, dense_below=0).bind(context)
        >>> bound.target_step, bound.facts.learned
        (9, ('deviations',))
    """

    def __init__(self, context: MethodContext, method: LearnedMethod):
        super().__init__(context, method.operator, method.gradient)
        self.method = method
        self.timetable = Timetable(method.schedule, context)
        begin = 1.0 if method.exact_from is None else method.exact_from
        self.target_step = max(math.ceil(begin * context.total_steps), self.timetable.target_step)
        dense = _stay_dense(context, method.dense_below)
        self._check(context, dense)
        weights, unit = context.weights, method.law.unit
        start = method.law.start(weights, context.sparsity)
        r = torch.full((len(weights.views),), start, dtype=weights.wide, device=weights.device)
        self.state = {
            unit: PerTensor.of(r),
            f"{unit}_velocity": PerTensor.of(torch.zeros_like(r)),
            "dense": PerTensor.of(2 * torch.tensor(dense, device=weights.device).long()),
        }
        self.facts = replace(
            self.facts,
            absent={"dense": PerTensor.of((weights.sizes < method.dense_below).long())},
            completes=True,
            learned=(unit,),
            follows_lr=True,
            # Gradients of r are sums over layers, with steep penalties. In a common norm they
            # would dominate, and clipping would leave almost no step for the weights.
            clips_own=False,
            exact=method.exact_from is not None,
            on_shards=True,
        )

    def _check(self, context: MethodContext, dense: Sequence[bool]) -> None:
        """Raise ConfigurationError if too many weights stay dense for the target."""
        sizes = [shape.numel() for shape in context.weights.shapes]
        most = sum(n for n, stays in zip(sizes, dense, strict=True) if not stays)
        target = round(context.sparsity * sum(sizes))
        if target > most:
            raise ConfigurationError(
                f"sparsity={context.sparsity} means {target} zeros, but only {most} of "
                f"{sum(sizes)} weights are in tensors of at least dense_below="
                f"{self.method.dense_below} weights. Lower dense_below or the target."
            )

    @property
    def fingerprint(self) -> str:
        return f"{self.method!r} {self.timetable.fingerprint}"

    @property
    def r(self) -> Tensor:
        """The learned parameters, of shape (tensors,)."""
        return self.state[self.method.law.unit].flat

    # Thresholds

    def update(self, weights: LatentWeights, step: Tensor) -> Pruning:
        tau, slope = self.method.law.thresholds(self.r, weights)
        target, scale = self.timetable.at(step), self.scale(tau, weights)
        cutoff = _at_one(weights)
        if self.facts.exact:
            done = step >= self.target_step
            if devices.synchronizes(weights.device):
                exact = self.exact_cutoff(target, scale, weights)
                cutoff = Cutoff(
                    *(torch.where(done, a, b) for a, b in zip(exact, cutoff, strict=True))
                )
            elif done:
                cutoff = self.exact_cutoff(target, scale, weights)
        segments = _segments(weights, cutoff, scale)
        return Learned(segments, self.progress(step), target, tau, slope)

    def cutoffs(self, weights: LatentWeights, step: Tensor) -> list[Segment]:
        return self.update(weights, step).segments

    def scale(self, tau: Tensor, weights: LatentWeights) -> Tensor:
        """Return 1 / tau, by which magnitudes are ranked; infinite if a tensor stays dense."""
        scale = 1 / tau.clamp_min(torch.finfo(weights.wide).tiny)
        return scale.masked_fill(self._is_dense(), torch.inf).to(weights.wide)

    def exact_cutoff(self, sparsity: Tensor, scale: Tensor, weights: LatentWeights) -> Cutoff:
        """Return the cutoff that prunes exactly the round(s N) lowest |w| times scale."""
        k = count_of(sparsity, weights.size)
        return select_weights(weights, k, list(scale))

    def _is_dense(self) -> Tensor:
        """Return the mask of the tensors that stay dense."""
        return self.state["dense"].flat != 0

    def _learned_counts(self, weights: LatentWeights, pruning: Learned) -> Tensor:
        """Return how many weights of each tensor the thresholds prune, without the exact count."""
        scales = torch.stack([s.scale for s in pruning.segments if s.scale is not None])
        return count_pruned(weights, _segments(weights, _at_one(weights), scales))

    def summary(self, weights: LatentWeights, pruning: Pruning) -> Summary:
        return Summary(learned_counts=self._learned_counts(weights, pruning))

    # Gradients

    def complete(
        self,
        weights: LatentWeights,
        pruning: Pruning,
        gradients: Gradients,
        effective: Sequence[Tensor],
        scale: Tensor | None,
    ) -> Completion:
        """Return dL/dr, from dL/dtau = sum of dL/dw (u - w) / tau over a tensor, plus the penalty.

        An operator scales with its threshold, u = tau f(w / tau), so du/dtau = f - f' w / tau.
        Straight-through, f' counts as 1, which leaves (u - w) / tau; for the soft threshold that
        is the true derivative. Source: ASL's gradient is the case u = w on kept weights.
        """
        # If gradients overflowed, GradScaler skips the optimizer of those weights, and no other.
        tau = partial(self.threshold, weights, pruning)
        sums = sums_of_changes(weights, self.operator, tau, effective, gradients)
        total = weights.total(sums).nan_to_num_(0.0, 0.0, 0.0)
        own = total * torch.where(pruning.tau > 0, pruning.slope / pruning.tau, 0.0)
        if scale is not None:
            own /= scale
        dense = self._is_dense()
        present = Present(
            dense,
            pruning.slope,
            lambda: weights.sizes - self._learned_counts(weights, pruning),
            pruning.target,
            outside=self.state["dense"].flat == 2,
        )
        own += self.method.law.penalty(self.r, weights, present)
        own = own.masked_fill(dense, 0.0).to(self.r.dtype)
        return Completion(own={self.method.law.unit: PerTensor.of(own)})

    def after_step(
        self,
        weights: LatentWeights,
        pruning: Pruning,
        gradients: Gradients,
        step: Tensor,
        lr: Rate,
        taken: bool | Tensor,
    ) -> None:
        velocity = self.state[f"{self.method.law.unit}_velocity"].flat
        self.method.optimizer.step(self.r, velocity, lr, taken)


def _stay_dense(context: MethodContext, below: int) -> tuple[bool, ...]:
    """Return which weight tensors stay dense: those that have fewer weights without groups."""
    groups = {name: layer.groups for name, layer in convolutions(context.model)}
    sizes = [shape.numel() for shape in context.weights.shapes]
    return tuple(
        size * groups.get(name, 1) < below for name, size in zip(context.names, sizes, strict=True)
    )


def _at_one(weights: LatentWeights) -> Cutoff:
    """Return the cutoff that prunes scores up to 1."""
    one = torch.ones((), dtype=weights.wide, device=weights.device)
    last = torch.full((), weights.size - 1, device=weights.device)
    return Cutoff(one, last, one.clone())


def _segments(weights: LatentWeights, cutoff: Cutoff, scale: Tensor) -> list[Segment]:
    """Return one segment per weight tensor, with a common cutoff and a scale each."""
    pairs = zip(weights.spans, scale, strict=True)
    return [Segment(start, stop, cutoff, own) for (start, stop), own in pairs]
