"""STR: one learned soft threshold per layer, raised until the network is sparse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...context import MethodContext
from ...errors import ConfigurationError
from ...gradient_rules import Masked
from ...operators import Soft
from ...schedules import Constant, Schedule
from ...weights.latent import LatentWeights, write_if
from ..base import Gradients, Pruning, Rate
from ..options import make_schedule
from ..own_parameters import Momentum
from .base import LearnedMethod, LearnedThresholds, Present


def str_(
    *,
    sparsity: float,
    decay: float | None = None,
    s_init: float = -100.0,
    lr_multiplier: float = 1.0,
    momentum: float = 0.9,
    exact: bool = True,
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
) -> LearnedMethod:
    """Return STR: a soft threshold sigmoid(s) per layer with a learned s.

    Pruned weights get no gradient. Source: Kusupati et al., Soft Threshold Weight
    Reparameterization for Learnable Sparsity (ICML 2020), where the weight decay of s alone sets
    the sparsity. The control that meets a target is an addition of this package (see
    `ControlledThresholds`).

    Args:
        sparsity: final fraction of zeros; the last step makes it exact (see `learned.base`).
        decay: None: the thresholds are controlled to follow the schedule. A number: as published,
            with this weight decay on s and no control.
        s_init: s before training. The authors advise -100 for CIFAR. The control soon replaces it.
        lr_multiplier: learning rate of s as a multiple of the optimizer's; published: 1.
        momentum: momentum of s; published: that of the weights.
        exact: with `decay`, whether the last step makes the count exact. False: the decay alone
            sets the final sparsity, as published, and `sparsity` has no effect.
        schedule, begin, end: as for `feather`, for the control.

    Raises:
        ConfigurationError: options that contradict each other.

    Example:
        >>> str_(sparsity=0.9).law
        Sigmoid(s_init=-100.0)
    """
    law = Sigmoid(s_init)
    if decay is None:
        if not exact:
            raise ConfigurationError(
                "exact=False belongs to STR as published, with decay=. Without decay the "
                "thresholds are controlled to meet the target. Leave out exact."
            )
        ramp = make_schedule(schedule, begin, end)
        return ControlledMethod(Soft(), Masked(), law, Momentum(lr_multiplier, momentum), ramp)
    if (schedule, begin, end) != ("cubic", 0, None):
        raise ConfigurationError(
            "With decay the sparsity follows no schedule. Leave out schedule, begin and end, or "
            "leave out decay."
        )
    optimizer, exact_from = Momentum(lr_multiplier, momentum, decay), 1.0 if exact else None
    return LearnedMethod(Soft(), Masked(), law, optimizer, Constant(), exact_from=exact_from)


@dataclass(frozen=True)
class Sigmoid:
    """tau = sigmoid(s), without a penalty.

    Attributes:
        s_init: s before training.

    Raises:
        ConfigurationError: s_init is not a finite float32 number.

    Example:
        >>> law, weights = Sigmoid(s_init=-100.0), LatentWeights([torch.ones(2)])
        >>> law.thresholds(torch.tensor([0.0]), weights)
        (tensor([0.5000]), tensor([0.2500]))
    """

    s_init: float
    unit = "logit"

    def __post_init__(self) -> None:
        if not abs(self.s_init) <= torch.finfo(torch.float32).max:
            raise ConfigurationError(
                f"s_init must be a finite float32 number, got {self.s_init!r}."
            )

    def start(self, weights: LatentWeights, sparsity: float) -> float:
        """Return `s_init`."""
        return self.s_init

    def thresholds(self, s: Tensor, weights: LatentWeights) -> tuple[Tensor, Tensor]:
        """Return tau and d tau / d s."""
        tau = s.sigmoid()
        return tau, tau * (1 - tau)

    def penalty(self, s: Tensor, weights: LatentWeights, now: Present) -> Tensor:
        """Return 0."""
        return torch.zeros_like(s)


class ControlledMethod(LearnedMethod):
    """Learned thresholds with a common factor that follows a schedule of the sparsity.

    Example:
        >>> method = str_(sparsity=0.9, schedule="linear")
        >>> type(method).__name__, method.schedule
        ('ControlledMethod', Linear(begin=0, end=None))
    """

    def bind(self, context: MethodContext) -> ControlledThresholds:
        return ControlledThresholds(context, self)


class ControlledThresholds(LearnedThresholds):
    """Multiplies all thresholds sigmoid(s) by one factor after every step.

    With this factor the scheduled number of weights lies below the thresholds. So the loss changes
    only the ratios between the thresholds of the layers. At small tau, a factor on tau is a term
    added to s, the same for all layers. Weight decay would add lambda |s| instead.

    Example:
        >>> from torch import nn
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> bound = str_(sparsity=0.5).bind(context)
        >>> bound.target_step, bound.facts.learned
        (10, ('logit',))
    """

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
        scale = self.scale(self.method.law.thresholds(self.r, weights)[0], weights)
        cutoff = self.exact_cutoff(self.timetable.at(step), scale, weights)
        limits = torch.finfo(weights.wide)
        # Slightly more, so that rounding does not bring the last pruned weight back.
        tau = cutoff.value / scale * (1 + 32 * limits.eps)
        s = tau.clamp(limits.tiny, 1 - limits.eps).logit()
        write_if(taken, [self.r], [torch.where(cutoff.value > 0, s, self.r)])
