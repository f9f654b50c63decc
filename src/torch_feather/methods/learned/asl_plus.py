"""ASL+: ASL with a model of each layer's weights, alone and as Feather's backbone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...gradient_rules import Schedule as ThetaSchedule
from ...schedules import Schedule
from ...weights.latent import LatentWeights, sum_blocks
from ..options import make_gradient, make_operator, make_schedule
from ..own_parameters import Momentum
from .asl import EXACT_FROM, StandardDeviations
from .base import LearnedMethod, Present


def feather_asl_plus(
    *,
    sparsity: float,
    p: float = 3.0,
    theta: float | str | ThetaSchedule = "auto",
    budget_weight: float = 30.0,
    lr_multiplier: float = 0.01,
    momentum: float = 0.9,
    dense_below: int = 1000,
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
) -> LearnedMethod:
    """Return Feather's operator and gradient rule at the thresholds that ASL+ learns.

    Source: the Feather supplement, section 4, mentions this combination. It does not define ASL+;
    `FittedDeviations` states the definition used here.

    Args:
        sparsity: final fraction of zeros; exact in the last tenth of training (see `learned.base`).
        p, theta: as for `feather`.
        budget_weight: lambda, the weight of the penalty.
        lr_multiplier: learning rate of r as a multiple of the optimizer's.
        momentum, dense_below: as for `asl`.
        schedule, begin, end: as for `feather`, for the budget.

    Example:
        >>> feather_asl_plus(sparsity=0.9).operator
        Power(p=3.0)
    """
    return LearnedMethod(
        operator=make_operator(p),
        gradient=make_gradient(theta, sparsity),
        law=FittedDeviations(budget_weight),
        optimizer=Momentum(lr_multiplier, momentum, low=0.0, high=5.0),
        schedule=make_schedule(schedule, begin, end),
        dense_below=dense_below,
        exact_from=EXACT_FROM,
    )


asl_plus = partial(feather_asl_plus, p=math.inf, theta=1.0)
asl_plus.__doc__ = """Return ASL+: ASL with the measured density and a better model of the weights.

Feather's supplement mentions ASL+ and cites ASL. No available text defines ASL+;
`FittedDeviations` states the interpretation used here.

Example:
    >>> asl_plus(sparsity=0.9).operator
    Hard()
"""

# mean|w| / std(w) below which a Laplace density is likelier than a normal one: sqrt(pi / 2e).
LAPLACE_BELOW = math.sqrt(math.pi / (2 * math.e))


@dataclass(frozen=True)
class FittedDeviations(StandardDeviations):
    """The thresholds of ASL, and a penalty on the measured density.

    The penalty is budget_weight log^2(D / (1 - s)), with the present density D and the scheduled
    sparsity s. A count has no derivative, so a model of the layer's weights gives it:
    d D_l / d r_l = D_l d log q_l / d r_l, with q_l the density of the model. The logarithm keeps
    the penalty strong at low densities, where ASL's (D - (1 - s))^2 nearly vanishes. The gradients
    of both penalties decrease as a layer loses weights.

    Example:
        >>> FittedDeviations(budget_weight=30.0).start(LatentWeights([torch.ones(2)]), 0.9)
        0.0
    """

    def start(self, weights: LatentWeights, sparsity: float) -> float:
        """Return 0: training starts dense."""
        return 0.0

    def penalty(self, r: Tensor, weights: LatentWeights, now: Present) -> Tensor:
        """Return the gradient of the penalty in r; r stays in its range, so `slope` is std(w)."""
        kept = now.kept().to(r.dtype)
        total = kept.sum().clamp_min(1)
        violation = (total / weights.size / (1 - now.sparsity)).log()
        magnitudes = partial(sum_blocks, lambda block: block.abs().sum(dtype=weights.wide))
        sums = torch.stack([magnitudes(w) for w in weights.views])
        concentration = weights.total(sums) / weights.sizes / now.slope
        slope = log_density_slope(r, concentration)
        return 2 * self.budget_weight * violation * (kept / total) * slope


def log_density_slope(r: Tensor, concentration: Tensor) -> Tensor:
    """Return d log q / dr, with q(r) the fraction of weights beyond r standard deviations.

    A layer is normal, q = erfc(r / sqrt 2), or Laplacian, q = exp(-r sqrt 2), whichever is
    likelier; weights that concentrate around 0 are Laplacian.

    Args:
        r: multiples of the standard deviation, >= 0, one per layer.
        concentration: mean|w| / std(w) of each layer.

    Example:
        >>> log_density_slope(torch.zeros(2), torch.tensor([0.8, 0.5]))  # normal, Laplacian
        tensor([-0.7979, -1.4142])
    """
    normal = -math.sqrt(2 / math.pi) / torch.special.erfcx(r / math.sqrt(2))
    return normal.masked_fill(concentration < LAPLACE_BELOW, -math.sqrt(2))
