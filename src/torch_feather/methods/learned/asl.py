"""ASL: thresholds in units of each layer's spread, learned against a budget of weights."""

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
from ...weights.latent import LatentWeights
from ..own_parameters import Momentum
from .base import LearnedMethod, Present

# Share of training after which the count is exact: what is left lets the network adapt.
EXACT_FROM = 0.9


def asl(
    *,
    sparsity: float,
    budget_weight: float = 10.0,
    rate: float = 0.01,
    momentum: float = 0.9,
    dense_below: int = 1000,
) -> LearnedMethod:
    """Hard threshold in each layer at its weights' standard deviation times a learned r.

    Source: Retsinas et al., Online Weight Pruning via Adaptive Sparsity Loss (ICIP 2021), and its
    public code for the start, the rates and the layers left dense. The public code also takes the
    mean off each layer at every forward pass; this does not.

    Args:
        sparsity: final share of zeros. The loss pulls towards it, under the assumption that the
            weights of a layer are normal; exact in the last tenth of training (see `learned`).
        budget_weight: lambda, the weight of (density - target density)^2 in the loss.
        rate: the learning rate of r as a multiple of the optimizer's.
        momentum: of r; it does not decay.
        dense_below: layers of fewer weights stay dense.
    """
    return LearnedMethod(
        operator=Hard(),
        gradient=StraightThrough(1.0),
        law=StandardDeviations(budget_weight),
        optimizer=Momentum(rate, momentum),
        schedule=Constant(),
        dense_below=dense_below,
        exact_from=EXACT_FROM,
    )


@dataclass(frozen=True)
class StandardDeviations:
    """tau = clamp(r, 0, 5) std(w) + 1e-6, and a penalty on the density of normal weights.

    The penalty is budget_weight (D - (1 - s))^2, with D = sum n (1 - erf(r / sqrt 2)) / N the
    share of weights that normal layers would keep; dense layers count as 1.
    """

    budget_weight: float = 10.0
    unit = "deviations"

    def __post_init__(self) -> None:
        if not 0 <= self.budget_weight < math.inf:
            raise ConfigurationError(f"budget_weight must be >= 0, got {self.budget_weight!r}.")

    def start(self, weights: LatentWeights, sparsity: float) -> float:
        """See `Law`."""
        return NormalDist().inv_cdf((1 + 0.6 * sparsity) / 2)  # sqrt(2) erfinv(.6 s)

    def thresholds(self, r: Tensor, weights: LatentWeights) -> tuple[Tensor, Tensor]:
        """See `Law`."""
        deviation = spreads(weights)
        inside = (r >= 0) & (r <= 5)
        return r.clamp(0, 5) * deviation + 1e-6, deviation * inside

    def penalty(self, r: Tensor, weights: LatentWeights, now: Present) -> Tensor:
        """See `Law`."""
        share = weights.sizes.to(r.dtype) / weights.size
        density = (share * torch.erfc(r / math.sqrt(2)).masked_fill(now.dense, 1.0)).sum()
        slope = -math.sqrt(2 / math.pi) * torch.exp(-(r**2) / 2)
        return 2 * self.budget_weight * (density - (1 - now.sparsity)) * share * slope


def spreads(weights: LatentWeights) -> Tensor:
    """The standard deviation of each weight tensor; that of a single weight is 0."""
    wide = [w.to(weights.wide) for w in weights.views]
    if weights.shards is None:
        return torch.stack([w.std() if w.numel() > 1 else w.new_zeros(()) for w in wide])
    means = weights.total(torch.stack([w.sum() for w in wide])) / weights.sizes
    pairs = zip(wide, means, strict=True)
    squares = weights.total(torch.stack([(w - mean).square().sum() for w, mean in pairs]))
    return (squares / (weights.sizes - 1).clamp_min(1)).sqrt()
