"""ASL: thresholds as multiples of each layer's standard deviation, learned against a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ...errors import ConfigurationError
from ...gradient_rules import StraightThrough
from ...operators import Hard
from ...schedules import Constant
from ...weights.deviations import standard_deviations
from ...weights.latent import LatentWeights
from ..own_parameters import Momentum
from .base import LearnedMethod, Present

# Fraction of training after which the count is exact, so that the network can adapt to it.
EXACT_FROM = 0.9


def asl(
    *,
    sparsity: float,
    budget_weight: float = 10.0,
    lr_multiplier: float = 0.01,
    momentum: float = 0.9,
    dense_below: int = 1000,
) -> LearnedMethod:
    """Return ASL: a hard threshold per layer at r times the standard deviation of its weights.

    Source: Retsinas et al., Online Weight Pruning via Adaptive Sparsity Loss (ICIP 2021). The
    initial r, the learning rates, the budget and the dense layers are those of its public code.
    That code also subtracts the mean of each layer at every forward pass; this method does not.

    Args:
        sparsity: final fraction of zeros. A term of the loss pulls towards it, assuming normally
            distributed weights. The count is exact in the last tenth of training (see
            `learned.base`).
        budget_weight: lambda, the weight of (density - target density)^2 in the loss.
        lr_multiplier: learning rate of r as a multiple of the optimizer's.
        momentum: momentum of r. r has no weight decay.
        dense_below: layers of fewer weights stay dense; see `LearnedMethod`.

    Example:
        >>> asl(sparsity=0.9).dense_below
        1000
    """
    return LearnedMethod(
        operator=Hard(),
        gradient=StraightThrough(1.0),
        law=StandardDeviations(budget_weight),
        optimizer=Momentum(lr_multiplier, momentum),
        schedule=Constant(),
        dense_below=dense_below,
        exact_from=EXACT_FROM,
    )


@dataclass(frozen=True)
class StandardDeviations:
    """tau = clamp(r, 0, 5) std(w) + 1e-6, and a penalty on the density of normal weights.

    The penalty is budget_weight (D - (1 - s))^2. D = sum n (1 - erf(r / sqrt 2)) / sum n is the
    density of layers with normally distributed weights. The sums are over the layers that do not
    stay dense, as in ASL's public code.

    Attributes:
        budget_weight: lambda.

    Raises:
        ConfigurationError: budget_weight is negative or infinite.

    Example:
        >>> law, weights = StandardDeviations(), LatentWeights([torch.tensor([-1.0, 1.0])])
        >>> tau, slope = law.thresholds(torch.tensor([0.5]), weights)  # std(w) is sqrt 2
        >>> tau, slope
        (tensor([0.7071]), tensor([1.4142]))
    """

    budget_weight: float = 10.0
    unit = "deviations"

    def __post_init__(self) -> None:
        if not 0 <= self.budget_weight < math.inf:
            raise ConfigurationError(f"budget_weight must be >= 0, got {self.budget_weight!r}.")

    def start(self, weights: LatentWeights, sparsity: float) -> float:
        """Return the r at which normally distributed weights have 0.6 of the sparsity."""
        return NormalDist().inv_cdf((1 + 0.6 * sparsity) / 2)  # sqrt(2) erfinv(.6 s)

    def thresholds(self, r: Tensor, weights: LatentWeights) -> tuple[Tensor, Tensor]:
        """Return tau and d tau / d r."""
        deviation = standard_deviations(weights)
        inside = (r >= 0) & (r <= 5)
        return r.clamp(0, 5) * deviation + 1e-6, deviation * inside

    def penalty(self, r: Tensor, weights: LatentWeights, now: Present) -> Tensor:
        """Return the gradient of the penalty in r."""
        sizes = weights.sizes
        if now.outside is not None:
            sizes = sizes.masked_fill(now.outside, 0)
        fraction = sizes.to(r.dtype) / sizes.sum().clamp_min(1)
        density = (fraction * torch.erfc(r / math.sqrt(2)).masked_fill(now.dense, 1.0)).sum()
        slope = -math.sqrt(2 / math.pi) * torch.exp(-(r**2) / 2)
        return 2 * self.budget_weight * (density - (1 - now.sparsity)) * fraction * slope
