"""Methods that prune by magnitude: operator, gradient rule, allocation, schedule.

Weights below their cutoff are 0; the operator gives the effective value of the others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import devices, scalars
from ..allocation import Allocation
from ..allocation.base import FittedAllocation
from ..context import MethodContext
from ..gradient_rules import GradientRule, StraightThrough
from ..latent_updates import LatentUpdate
from ..operators import Operator
from ..schedules import Schedule, make_table
from ..weights import triton_passes
from ..weights.counts import count_true
from ..weights.latent import LatentWeights, PerTensor, write_if
from ..weights.passes import pruned_mask, write_effective
from ..weights.segments import Segment, segment_of
from .base import BoundMethod, Facts, Gradients, Pruning, Rate, Summary


@dataclass(frozen=True)
class Method:
    """A method of four independent parts, and an optional fifth.

    Attributes:
        operator: the effective value of a kept weight.
        gradient: how dL/du becomes dL/dw.
        allocation: how the target is divided among the layers.
        schedule: the sparsity over time.
        latent_update: elementwise change of the latent weights after each step; None for none.

    Example:
        >>> from torch_feather.allocation import Global
        >>> from torch_feather.gradient_rules import Masked
        >>> from torch_feather.operators import Hard
        >>> from torch_feather.schedules import Cubic
        >>> Method(Hard(), Masked(), Global(), Cubic()).schedule
        Cubic(begin=0, end=None)
    """

    operator: Operator
    gradient: GradientRule
    allocation: Allocation
    schedule: Schedule
    latent_update: LatentUpdate | None = field(default=None, kw_only=True)

    def bind(self, context: MethodContext) -> BoundMethod:
        """Return the method on one model."""
        return MagnitudePruning(context, self)


class Cutoffs(NamedTuple):
    """The pruning of a method with thresholds.

    Example:
        >>> from torch import nn
        >>> from torch_feather.methods import feather
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> pruning = feather(sparsity=0.5).bind(context).update(weights, torch.tensor(5))
        >>> pruning.segments[0].threshold, pruning.progress
        (tensor(2.), tensor(0.5000, dtype=torch.float64))
    """

    segments: list[Segment]
    """Cover all weights once."""
    progress: Tensor
    """Completed fraction of training, 0-dimensional float64."""


class Thresholded(BoundMethod):
    """Prunes weights below a cutoff; subclasses find the cutoffs.

    Args:
        context: the model, its prunable weights, the target and the number of steps.
        operator: the effective value of a kept weight.
        gradient: how dL/du becomes dL/dw.

    Example:
        >>> from torch import nn
        >>> from torch_feather.methods import feather
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> bound = feather(sparsity=0.5).bind(context)
        >>> pruning = bound.update(weights, torch.tensor(5))
        >>> bound.pruned(weights, pruning, 0).tolist(), float(bound.threshold(weights, pruning, 0))
        ([[True, True, False, False]], 2.0)
    """

    def __init__(self, context: MethodContext, operator: Operator, gradient: GradientRule):
        super().__init__(context)
        self.operator, self.gradient = operator, gradient
        self.facts = Facts(pulls_back=not getattr(gradient, "is_identity", False))

    @abstractmethod
    def cutoffs(self, weights: LatentWeights, step: Tensor) -> list[Segment]:
        """Return the cutoffs through these latent weights after `step` steps."""

    def update(self, weights: LatentWeights, step: Tensor) -> Pruning:
        return Cutoffs(self.cutoffs(weights, step), self.progress(step))

    def progress(self, step: Tensor) -> Tensor:
        """Return the completed fraction of training after `step` steps, 0-dimensional float64."""
        return scalars.progress(step, self.total_steps)

    def write_effective(
        self, weights: LatentWeights, pruning: Pruning, out: Sequence[Tensor]
    ) -> None:
        write_effective(weights, pruning.segments, self.operator, out)

    def pruned(self, weights: LatentWeights, pruning: Pruning, i: int) -> Tensor:
        return pruned_mask(weights, pruning.segments, i)

    def threshold(self, weights: LatentWeights, pruning: Pruning, i: int) -> Tensor:
        return segment_of(weights, pruning.segments, i).threshold

    def pull_back(
        self, weights: LatentWeights, pruning: Pruning, i: int, gradient: Tensor, effective: Tensor
    ) -> Tensor:
        value = segment_of(weights, pruning.segments, i).cutoff.value
        return self.apply_rule(weights.views[i], value, pruning.progress, gradient, effective)

    def apply_rule(
        self, latent: Tensor, cutoff: Tensor, progress: Tensor, gradient: Tensor, effective: Tensor
    ) -> Tensor:
        """Return dL/dw by the gradient rule.

        With a cutoff at 0 or below, only zeros are pruned. They count as kept, so that a layer that
        is initialized to 0 learns: the rule gets the smallest positive number instead of them.

        Args:
            latent: w.
            cutoff: value of the cutoff, 0-dimensional.
            progress: completed fraction of training, 0-dimensional.
            gradient: dL/du.
            effective: u.
        """
        if not self.facts.pulls_back:
            return gradient
        if type(self.gradient) is StraightThrough and isinstance(self.gradient.theta, float):
            result = triton_passes.pull_back(gradient, effective, cutoff, self.gradient.theta)
            if result is not None:
                return result
        on_device = devices.synchronizes(cutoff.device)
        if on_device or not cutoff.item() > 0:
            effective = mark_kept(effective, cutoff <= 0)
        return self.gradient(gradient, latent, effective, progress)


def mark_kept(effective: Tensor, kept: Tensor) -> Tensor:
    """Return effective weights with the smallest positive number for kept weights that are 0.

    Args:
        effective: u.
        kept: mask of the kept weights, broadcastable to `effective`.

    Example:
        >>> mark_kept(torch.zeros(2), torch.tensor([True, False])) > 0
        tensor([ True, False])
    """
    return effective.masked_fill((effective == 0) & kept, torch.finfo(effective.dtype).tiny)


class Timetable:
    """The target sparsity after each step of one training run.

    Attributes:
        fractions: fraction of the final target after 0 .. total_steps steps, on the host.
        target_step: the step from which on the target is the final one.

    Args:
        schedule: the sparsity over time.
        context: the final sparsity, the number of steps, the device.

    Example:
        >>> from torch import nn
        >>> from torch_feather.schedules import Linear
        >>> context = MethodContext(nn.Linear(1, 1), [], LatentWeights([torch.ones(1)]), 0.8, 4)
        >>> timetable = Timetable(Linear(0, 2), context)
        >>> float(timetable.at(torch.tensor(1))), timetable.target_step
        (0.4, 2)
    """

    def __init__(self, schedule: Schedule, context: MethodContext):
        self.fractions = make_table(schedule, context.total_steps)
        self.target_step = int(np.flatnonzero(self.fractions != 1).max(initial=-1)) + 1
        tables = np.stack([self.fractions * context.sparsity, 1 - self.fractions])
        self._tables = torch.from_numpy(tables).to(context.weights.device)

    @property
    def fingerprint(self) -> str:
        """Text that identifies the timetable in checkpoints."""
        return self.fractions.tobytes().hex()

    def at(self, step: Tensor, zeros: Tensor | None = None, size: int = 1) -> Tensor:
        """Return the target sparsity after `step` steps, 0-dimensional float64.

        Args:
            step: 0-dimensional; the last value holds beyond the table.
            zeros: zeros of each weight tensor that the schedule starts from; None for none.
            size: number of weights.
        """
        if self._tables.device != step.device:  # the weights were moved
            self._tables = self._tables.to(step.device)
        return scalars.scheduled(step, self._tables[0], self._tables[1], zeros, size)


class MagnitudePruning(Thresholded):
    """A `Method` on one model: the allocation finds cutoffs for the scheduled count.

    State: `zeros`, the number of zeros of each tensor when training began. The schedule starts from
    them, so a model that is already sparse keeps its mask.

    Args:
        context: the model, its prunable weights, the target and the number of steps.
        method: the parts of the method.

    Attributes:
        keeps_zeros: whether the schedule starts from these zeros; if not, `zeros` are 0.

    Example:
        >>> from torch import nn
        >>> from torch_feather.methods import gmp
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> bound = gmp(sparsity=0.5).bind(context)
        >>> bound.target_step, list(bound.state)
        (5, ['zeros'])
    """

    keeps_zeros = True

    def __init__(self, context: MethodContext, method: Method):
        super().__init__(context, method.operator, method.gradient)
        self.method, self.latent_update = method, method.latent_update
        self.allocation = method.allocation.fit(context)
        zeros = context.weights.zeros()
        initial = self.allocation.initial_state(context)
        initial["zeros"] = zeros if self.keeps_zeros else torch.zeros_like(zeros)
        self.state = {name: PerTensor.of(entry) for name, entry in initial.items()}
        self.timetable = Timetable(method.schedule, context)
        self.target_step = self.timetable.target_step
        self.facts = replace(self.facts, on_shards=self.allocation.on_shards)

    @property
    def fingerprint(self) -> str:
        m = self.method
        parts = f"{m.operator!r} {m.gradient!r} {m.allocation!r} {self.timetable.fingerprint}"
        return parts if m.latent_update is None else f"{parts} {m.latent_update!r}"

    def cutoffs(self, weights: LatentWeights, step: Tensor) -> list[Segment]:
        target = self.timetable.at(step, self.state["zeros"].flat, weights.size)
        return self.allocation.cutoffs(weights, target, self._entries())

    def _entries(self) -> dict[str, Tensor]:
        """Return the state as tensors with one number per weight tensor."""
        return {name: entry.flat for name, entry in self.state.items() if not entry.per_weight}

    def after_step(
        self,
        weights: LatentWeights,
        pruning: Pruning,
        gradients: Gradients,
        step: Tensor,
        lr: Rate,
        taken: bool | Tensor,
    ) -> None:
        changed = self.allocation.next_state(weights, self.sparsity, self._entries())
        for name, value in changed.items():
            write_if(taken, [self.state[name].flat], [value])

    def summary(self, weights: LatentWeights, pruning: Pruning) -> Summary:
        if type(self.allocation).violation is FittedAllocation.violation:
            return Summary()  # nothing to count
        every = range(len(weights.views))
        counts = [count_true(self.pruned(weights, pruning, i)) for i in every]
        kept = 1 - weights.total(torch.stack(counts)).double() / weights.sizes.clamp_min(1)
        return Summary(violation=self.allocation.violation(weights, kept, self._entries()))
