"""Methods with thresholds: an operator, a gradient rule, and cuts through the magnitudes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import devices
from ..gradient_rules import GradientRule
from ..operators import Operator
from ..schedules import Schedule, make_table
from ..weights.latent import LatentWeights, Segment, renew
from .base import Rate, Reparametrization, Setting

if TYPE_CHECKING:
    from .magnitude import Method


class Thresholded(Reparametrization):
    """Weights below their cut are 0, the others what the operator makes of them."""

    def __init__(self, setting: Setting, operator: Operator, gradient: GradientRule):
        super().__init__(setting)
        self.operator, self.gradient = operator, gradient
        self.segments: list[Segment] = []

    @abstractmethod
    def cuts(self, weights: LatentWeights, step: Tensor) -> list[Segment]:
        """The cuts through these latent weights after `step` steps; they cover all once."""

    def apply(
        self, weights: LatentWeights, segments: Sequence[Segment]
    ) -> tuple[list[Tensor], Tensor]:
        """The images of latent weights with these cuts, and their sum."""
        return weights.images(segments, self.operator)

    def refresh(self, weights: LatentWeights, step: Tensor) -> None:
        """See `Reparametrization`."""
        self.segments = renew(self.segments, self.cuts(weights, step))

    def images(self, weights: LatentWeights) -> tuple[list[Tensor], Tensor]:
        """See `Reparametrization`."""
        return self.apply(weights, self.segments)

    def images_of(self, weights: LatentWeights, step: Tensor) -> list[Tensor]:
        """See `Reparametrization`."""
        return self.apply(weights, self.cuts(weights, step))[0]

    def pruned(self, weights: LatentWeights, i: int) -> Tensor:
        """See `Reparametrization`."""
        return weights.pruned(i, self.segments)

    def threshold(self, weights: LatentWeights, i: int) -> Tensor:
        """See `Reparametrization`."""
        return weights.segment_of(i, self.segments).threshold

    @property
    def pulls_back(self) -> bool:  # type: ignore[override]
        """See `Reparametrization`."""
        return not self.gradient.is_identity

    def pull_back(self, weights: LatentWeights, i: int, gradient: Tensor, image: Tensor) -> Tensor:
        """A weight whose image is 0 is pruned, unless the cut is at 0: zero layers are to learn."""
        if self.gradient.is_identity:
            return gradient
        value = weights.segment_of(i, self.segments).cut.value
        if devices.synchronizes(value.device):
            return torch.where(value > 0, self.gradient(gradient, image), gradient)
        return self.gradient(gradient, image) if value > 0 else gradient

    def move(self, weights: LatentWeights) -> None:
        """See `Reparametrization`."""
        super().move(weights)
        self.segments = []


class Timetable:
    """The sparsity that is wanted after each step, where the weights are.

    Attributes:
        shares: of the target, as the schedule's table has them (on the host).
        arrival: the step from which on the target is wanted, to the end.
    """

    def __init__(self, schedule: Schedule, setting: Setting):
        self.shares = make_table(schedule, setting.total_steps)
        self.arrival = int(np.flatnonzero(self.shares != 1).max(initial=-1)) + 1
        self._shares, self._target = torch.from_numpy(self.shares), setting.sparsity
        self.move(setting.weights.device)

    @property
    def identity(self) -> str:
        """Tells it from others, in checkpoints."""
        return self.shares.tobytes().hex()

    def at(self, step: Tensor, begin: Tensor | float = 0.0) -> Tensor:
        """The sparsity after `step` steps, 0-dimensional float64; it stays at its last value.

        Args:
            step: 0-dimensional.
            begin: the sparsity that the schedule starts from.
        """
        # take, not an index: that would read the step on the host.
        share = self._shares.take(step.clamp(max=len(self.shares) - 1))
        return share * self._target + begin * (1 - share)

    def move(self, device: torch.device) -> None:
        """The weights are now there."""
        self._shares = self._shares.to(device)


class Scheduled(Thresholded):
    """The four parts of a `Method` at work: the allocation finds cuts of the scheduled count.

    State: `zeros`, the weights of each tensor that were 0 when training began. Their share is what
    the schedule starts from, so a model that is sparse already keeps its mask.

    Attributes:
        keeps_zeros: whether it does; otherwise `zeros` are none.
    """

    keeps_zeros = True

    def __init__(self, setting: Setting, method: Method):
        super().__init__(setting, method.operator, method.gradient)
        self.method = method
        self.allocation = method.allocation.fit(setting)
        self.state = self.allocation.state  # the same dict: it may be loaded, and moved
        zeros = setting.weights.zeros()
        self.state["zeros"] = zeros if self.keeps_zeros else torch.zeros_like(zeros)
        self.timetable = Timetable(method.schedule, setting)
        self.arrival = self.timetable.arrival

    @property
    def on_shards(self) -> bool:  # type: ignore[override]
        """See `Reparametrization`."""
        return self.allocation.on_shards

    @property
    def identity(self) -> str:
        """See `Reparametrization`."""
        m = self.method
        return f"{m.operator!r} {m.gradient!r} {m.allocation!r} {self.timetable.identity}"

    def cuts(self, weights: LatentWeights, step: Tensor) -> list[Segment]:
        """See `Thresholded`."""
        zeros = self.state["zeros"]
        assert isinstance(zeros, Tensor)
        begin = zeros.sum().double() / weights.size
        return self.allocation.cuts(weights, self.timetable.at(step, begin))

    def advance(
        self, weights: LatentWeights, step: Tensor, rate: Rate, taken: bool | Tensor
    ) -> None:
        """See `Reparametrization`."""
        if self.allocation.follows:
            self.allocation.follow(weights, self.sparsity, taken)

    def excess(self, weights: LatentWeights) -> str | None:
        """See `Reparametrization`."""
        pruned = self.counts_pruned(weights).double() / weights.sizes.clamp_min(1)
        return self.allocation.excess(weights, 1 - pruned)

    def admits(self, weights: LatentWeights, step: Tensor) -> bool:
        """See `Reparametrization`. Zeros are the smallest scores: they would be pruned first."""
        segments = self.cuts(weights, step)
        pairs = enumerate(weights.views)
        torn = torch.stack([((w == 0) != weights.pruned(i, segments)).sum() for i, w in pairs])
        return not bool(weights.total(torn).sum())

    def move(self, weights: LatentWeights) -> None:
        """See `Reparametrization`."""
        super().move(weights)
        self.timetable.move(weights.device)
