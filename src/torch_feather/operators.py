"""What becomes of a weight at threshold tau: the operators that make a network sparse.

An operator maps the latent weights that survive, |w| >= tau, to their effective values. Which
weights survive is the selection's business, so an operator never has to decide a tie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import ConfigurationError


class Operator(Protocol):
    """The image of kept weights at a threshold."""

    @property
    def is_identity(self) -> bool:
        """Whether kept weights keep their value whatever the threshold."""

    def __call__(self, w: Tensor, tau: Tensor) -> Tensor:
        """Effective values of kept weights.

        Args:
            w: kept latent weights, any shape, float32 or float64, with |w| >= tau.
            tau: the threshold, 0-dimensional or broadcastable to `w`.
        """


@dataclass(frozen=True)
class Power:
    """T_p(w; tau) = sign(w) (|w|^p - tau^p)^(1/p), Feather's family of thresholds.

    p = 1 is the soft threshold, p -> infinity the hard one, p = 3 the paper's choice. Computed as
    w (1 - (tau / |w|)^p)^(1/p), since |w|^3 underflows for small weights.
    Source: Feather (BMVC 2023), section 3, and its supplement, section 2.
    """

    p: float = 3.0
    is_identity = False

    def __post_init__(self) -> None:
        if not isinstance(self.p, int | float) or not 1.0 <= self.p < math.inf:
            raise ConfigurationError(
                f"p must be a number >= 1 (1 is soft thresholding; for hard use Hard()), "
                f"got {self.p!r}."
            )
        object.__setattr__(self, "p", float(self.p))  # 3 and 3.0 are one method

    def __call__(self, w: Tensor, tau: Tensor) -> Tensor:
        """See `Operator`."""
        if self.p == 1.0:
            return w - tau * w.sign()
        share = tau / w.abs()
        share = share.pow_(self.p).neg_().add_(1.0).clamp_min_(0.0).pow_(1.0 / self.p)
        # 0 / 0 where both are 0: such a weight is its own image.
        return torch.where(w == 0, w, share.mul_(w))


@dataclass(frozen=True)
class Hard:
    """Kept weights keep their value: the limit of `Power` for p -> infinity."""

    is_identity = True

    def __call__(self, w: Tensor, tau: Tensor) -> Tensor:
        """See `Operator`."""
        return w


def Soft() -> Power:  # noqa: N802 - named like the operators it stands beside
    """Soft thresholding, sign(w) (|w| - tau): `Power` with p = 1."""
    return Power(1.0)


def power_threshold(w: Tensor, tau: Tensor | float, p: float = 3.0) -> Tensor:
    """T_p(w; tau) of any tensor: 0 where |w| <= tau, sign(w) (|w|^p - tau^p)^(1/p) elsewhere.

    Args:
        w: weights, any shape and floating type; half precision is computed in float32.
        tau: threshold >= 0, a number or a tensor broadcastable to `w`.
        p: >= 1; `math.inf` gives the hard threshold.

    Returns:
        A tensor like `w`. Differentiation through it gives the operator's true derivative, not
        Feather's straight-through gradient: for training use `sparsify`.
    """
    operator: Operator = Hard() if p == math.inf else Power(float(p))
    wide = w if w.dtype == torch.float64 else w.float()
    tau = torch.as_tensor(tau, dtype=wide.dtype, device=wide.device)
    if bool((tau < 0).any()):
        raise ConfigurationError(f"tau must be >= 0, got {tau.min().item()}.")
    pruned = wide.abs() <= tau
    # Pruned weights are moved out of the way so that no infinite derivative meets a zero.
    image = operator(torch.where(pruned, 2 * tau + 1, wide), tau)
    return torch.where(pruned, 0.0, image).to(w.dtype)
