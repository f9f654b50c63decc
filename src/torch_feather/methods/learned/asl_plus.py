"""ASL+: a reading of ASL with a model of each layer's weights, alone and as Feather's backbone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...schedules import Schedule
from ...weights.latent import LatentWeights
from ..feather import power, scaled_gradient
from ..magnitude import make_schedule
from ..own_parameters import Momentum
from .asl import EXACT_FROM, StandardDeviations
from .base import LearnedMethod, Present


def feather_asl_plus(
    *,
    sparsity: float,
    p: float = 3.0,
    theta: float | str = "auto",
    budget_weight: float = 30.0,
    rate: float = 0.01,
    momentum: float = 0.9,
    dense_below: int = 1000,
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
) -> LearnedMethod:
    """`feather`'s threshold and gradient, at the thresholds that `asl+` learns.

    Source: the Feather supplement, section 4, names the combination, and ASL+ without a definition;
    see `FittedDeviations` for what is ours.

    Args:
        sparsity: final share of zeros; exact in the last tenth of training (see `learned`).
        p, theta: as for `feather`.
        budget_weight: lambda, the weight of the penalty.
        rate: the learning rate of r as a multiple of the optimizer's.
        momentum, dense_below: as for `asl`.
        schedule, begin, end: as for `feather`, of the budget.
    """
    return LearnedMethod(
        operator=power(p),
        gradient=scaled_gradient(theta, sparsity),
        law=FittedDeviations(budget_weight),
        optimizer=Momentum(rate, momentum, low=0.0, high=5.0),
        schedule=make_schedule(schedule, begin, end),
        dense_below=dense_below,
        exact_from=EXACT_FROM,
    )


asl_plus = partial(feather_asl_plus, p=math.inf, theta=1.0)
asl_plus.__doc__ = """`asl` that measures how sparse it is, and models each layer's weights better.

Feather's supplement names an ASL+ and cites ASL; no text that we could reach defines the plus.
This is our reading: see `FittedDeviations`.
"""

# mean|w| / std(w) below which a Laplace density is likelier than a normal one: sqrt(pi / 2e).
LAPLACE_BELOW = math.sqrt(math.pi / (2 * math.e))


@dataclass(frozen=True)
class FittedDeviations(StandardDeviations):
    """The thresholds of ASL, and a penalty on the density that is measured.

    The penalty is budget_weight log^2(D / (1 - s)), with D the share of weights that is kept now
    and s the sparsity wanted now. A count has no derivative, so a model of the layer's weights
    gives it: d D_l / d r_l = D_l d log q_l / d r_l, with q_l the share that the model keeps. The
    logarithm keeps the penalty strong where few weights are left; ASL's (D - (1 - s))^2 has next
    to no force there. Both also spare a layer in proportion to what it has lost.
    """

    def start(self, weights: LatentWeights, sparsity: float) -> float:
        """See `Law`."""
        return 0.0

    def penalty(self, r: Tensor, weights: LatentWeights, now: Present) -> Tensor:
        """See `Law`. As r stays within its range, d tau / d r is the standard deviation."""
        kept = now.kept().to(r.dtype)
        total = kept.sum().clamp_min(1)
        excess = (total / weights.size / (1 - now.sparsity)).log()
        sums = torch.stack([w.abs().sum(dtype=weights.wide) for w in weights.views])
        concentration = weights.total(sums) / weights.sizes / now.slope
        slope = log_density_slope(r, concentration)
        return 2 * self.budget_weight * excess * (kept / total) * slope


def log_density_slope(r: Tensor, concentration: Tensor) -> Tensor:
    """d log q / dr, with q(r) the share of weights beyond r standard deviations of their layer.

    A layer is normal, with q = erfc(r / sqrt 2), or, where its weights concentrate around 0,
    Laplacian, with q = exp(-r sqrt 2): whichever is likelier.

    Args:
        r: multiples of the standard deviation, >= 0, one for each layer.
        concentration: mean|w| / std(w) of each layer.
    """
    normal = -math.sqrt(2 / math.pi) / torch.special.erfcx(r / math.sqrt(2))
    return normal.masked_fill(concentration < LAPLACE_BELOW, -math.sqrt(2))
