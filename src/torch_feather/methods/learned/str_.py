"""STR: soft thresholds that are learned layer by layer, and raised until the network is sparse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigurationError
from ...gradient_rules import Masked
from ...operators import Soft
from ...schedules import Constant, Schedule
from ...weights.latent import LatentWeights
from ..base import Rate, Setting
from ..magnitude import make_schedule
from ..own_parameters import Momentum, write_if
from .base import LearnedMethod, LearnedThresholds, Present


def str_(
    *,
    sparsity: float,
    decay: float | None = None,
    s_init: float = -100.0,
    rate: float = 1.0,
    momentum: float = 0.9,
    exact: bool = True,
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
) -> LearnedMethod:
    """Soft threshold in each layer at sigmoid(s) with a learned s; pruned weights get no gradient.

    Source: Kusupati et al., Soft Threshold Weight Reparameterization for Learnable Sparsity (ICML
    2020), where the weight decay of s alone decides how sparse the network becomes. The control
    that meets a target instead is ours (see `ControlledThresholds`).

    Args:
        sparsity: final share of zeros; the last step makes it exact (see `learned`).
        decay: None: the thresholds are controlled so that the sparsity follows its schedule. A
            number: as published, with this weight decay on s and no control.
        s_init: s before training; -100 is what the authors advise for CIFAR. The control soon
            finds its own.
        rate: the learning rate of s as a multiple of the optimizer's; published: 1.
        momentum: of s; published: that of the weights.
        exact: with `decay`, whether the last step makes the count that of `sparsity`. False: the
            end is what the decay leads to, as published, and `sparsity` means nothing.
        schedule, begin, end: as for `feather`, of the control.
    """
    law = Sigmoid(s_init)
    if decay is None:
        if not exact:
            raise ConfigurationError(
                "exact=False belongs to STR as published, with decay=: without it the thresholds "
                "are controlled to meet the target."
            )
        when = make_schedule(schedule, begin, end)
        return ControlledMethod(Soft(), Masked(), law, Momentum(rate, momentum), when)
    if (schedule, begin, end) != ("cubic", 0, None):
        raise ConfigurationError(
            "With decay the sparsity follows no schedule: leave out schedule, begin and end, or "
            "leave out decay."
        )
    inner, exact_from = Momentum(rate, momentum, decay), 1.0 if exact else None
    return LearnedMethod(Soft(), Masked(), law, inner, Constant(), exact_from=exact_from)


@dataclass(frozen=True)
class Sigmoid:
    """tau = sigmoid(s), without a penalty."""

    s_init: float
    unit = "logit"

    def __post_init__(self) -> None:
        if not -math.inf < self.s_init < math.inf:
            raise ConfigurationError(f"s_init must be a finite number, got {self.s_init!r}.")

    def start(self, weights: LatentWeights, sparsity: float) -> float:
        """See `Law`."""
        return self.s_init

    def thresholds(self, s: Tensor, weights: LatentWeights) -> tuple[Tensor, Tensor]:
        """See `Law`."""
        tau = s.sigmoid()
        return tau, tau * (1 - tau)

    def penalty(self, s: Tensor, weights: LatentWeights, now: Present) -> Tensor:
        """See `Law`."""
        return torch.zeros_like(s)


class ControlledMethod(LearnedMethod):
    """Learned thresholds whose common level follows a schedule of the sparsity."""

    def attach(self, setting: Setting) -> ControlledThresholds:
        """See `AnyMethod`."""
        return ControlledThresholds(setting, self)


class ControlledThresholds(LearnedThresholds):
    """After every step all thresholds sigmoid(s) are multiplied by one factor.

    It is the one with which as many weights lie below them as the schedule wants. So what the loss
    moves is how the layers' thresholds relate. Where tau is small, a factor on it is a summand on
    s: the same push for all layers, where decay pushes by lambda |s|.
    """

    def advance(
        self, weights: LatentWeights, step: Tensor, rate: Rate, taken: bool | Tensor
    ) -> None:
        """See `Reparametrization`."""
        super().advance(weights, step, rate, taken)
        wanted = self.timetable.at(step)
        scale = self.scale(self.method.law.thresholds(self.r, weights)[0], weights)
        cut = self.cut_at(wanted, scale, weights)
        limits = torch.finfo(weights.wide)
        # A little more, so that rounding does not bring the last pruned weight back.
        tau = cut.value / scale * (1 + 32 * limits.eps)
        s = tau.clamp(limits.tiny, 1 - limits.eps).logit()
        write_if(taken, [self.r], [torch.where(cut.value > 0, s, self.r)])
