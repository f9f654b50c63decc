"""Operators: the effective value of a kept weight at a threshold tau.

An operator maps latent weights that survive, |w| >= tau, to their effective values. The selection
decides which weights survive, so an operator never has to decide a tie.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from .errors import ConfigurationError
from .roots import cube_root, power, square_root


class Operator(ABC):
    """Maps kept weights to effective weights; its `repr` is part of a method's fingerprint.

    Attributes:
        is_identity: whether kept weights keep their value at every threshold.
        identity_at_zero: whether they do at tau = 0, so that nothing is computed in a dense phase.

    Example:
        >>> class Halve(Operator):
        ...     def __call__(self, w, tau):
        ...         return w / 2
        >>> Halve()(torch.tensor([4.0]), torch.tensor(1.0))
        tensor([2.])
    """

    is_identity = False
    identity_at_zero = False

    @abstractmethod
    def __call__(self, w: Tensor, tau: Tensor) -> Tensor:
        """Return the effective values of kept weights.

        Args:
            w: kept latent weights, any shape, float32 or float64, with |w| >= tau.
            tau: the threshold, 0-dimensional or broadcastable to `w`.
        """


@dataclass(frozen=True)
class Power(Operator):
    """T_p(w; tau) = sign(w) (|w|^p - tau^p)^(1/p), Feather's family of thresholds.

    p = 1 is the soft threshold, p -> infinity the hard one, p = 3 the paper's choice. Computed as
    w (1 - (tau / |w|)^p)^(1/p), since |w|^3 underflows for small weights.
    Source: Feather (BMVC 2023), section 3, and its supplement, section 2.

    Raises:
        ConfigurationError: p is not a finite number >= 1.

    Example:
        >>> Power(3.0)(torch.tensor([2.0]), torch.tensor(1.0)) ** 3
        tensor([7.0000])
    """

    p: float = 3.0
    identity_at_zero = True

    def __post_init__(self) -> None:
        if not isinstance(self.p, int | float) or not 1.0 <= self.p < math.inf:
            raise ConfigurationError(
                f"p must be a number >= 1 (1 is soft thresholding; for hard use Hard()), "
                f"got {self.p!r}."
            )
        object.__setattr__(self, "p", float(self.p))  # 3 and 3.0 are one method

    def __call__(self, w: Tensor, tau: Tensor) -> Tensor:
        if self.p == 1.0:
            return w - tau * w.sign()
        ratio = tau / w.abs()
        rest = (1.0 - self._power(ratio)).clamp_min_(0.0)
        # 0 / 0 if both are 0: such a weight is its own effective value.
        return torch.where(w == 0, w, self._root(rest) * w)

    def _power(self, x: Tensor) -> Tensor:
        """Return x^p; for p = 2 and 3 by products, which all devices round alike."""
        if self.p == 2.0:
            return x * x
        return x * x * x if self.p == 3.0 else power(x, self.p)

    def _root(self, x: Tensor) -> Tensor:
        """Return x^(1/p) of numbers in [0, 1]; for p = 2 and 3 with the same bits everywhere."""
        if self.p == 2.0:
            return square_root(x)
        return cube_root(x) if self.p == 3.0 else power(x, 1.0 / self.p)


@dataclass(frozen=True)
class Hard(Operator):
    """Kept weights keep their value: the limit of `Power` for p -> infinity.

    Example:
        >>> Hard()(torch.tensor([2.0]), torch.tensor(1.0))
        tensor([2.])
    """

    is_identity = True
    identity_at_zero = True

    def __call__(self, w: Tensor, tau: Tensor) -> Tensor:
        return w


def Soft() -> Power:  # noqa: N802 - named like the operators
    """Return soft thresholding, sign(w) (|w| - tau): `Power` with p = 1.

    Example:
        >>> Soft()(torch.tensor([2.0]), torch.tensor(0.5))
        tensor([1.5000])
    """
    return Power(1.0)


def power_threshold(w: Tensor, tau: Tensor | float, p: float = 3.0) -> Tensor:
    """Return T_p(w; tau): 0 if |w| <= tau, otherwise sign(w) (|w|^p - tau^p)^(1/p).

    Differentiation gives the operator's true derivative, not Feather's straight-through gradient;
    for training use `sparsify`.

    Args:
        w: weights, any shape and floating type; half precision is computed in float32.
        tau: threshold >= 0, a number or a tensor broadcastable to `w`.
        p: exponent >= 1; `math.inf` gives the hard threshold.

    Returns:
        A tensor like `w`.

    Raises:
        ConfigurationError: w is not a floating-point tensor, tau is negative or no number, or
            p < 1.

    Example:
        >>> power_threshold(torch.tensor([0.5, -2.0]), 1.0, p=1.0)
        tensor([ 0., -1.])
    """
    if not isinstance(w, Tensor) or not w.is_floating_point():
        kind = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise ConfigurationError(f"w must be a floating-point tensor, got {kind}.")
    if not isinstance(tau, Tensor | Real):
        raise ConfigurationError(f"tau must be a number or a tensor, got {tau!r:.80}.")
    operator: Operator = Hard() if p == math.inf else Power(p)
    wide = w if w.dtype == torch.float64 else w.float()
    tau = torch.as_tensor(tau, dtype=wide.dtype, device=wide.device)
    if bool((tau < 0).any()):
        raise ConfigurationError(f"tau must be >= 0, got {tau.min().item()}.")
    pruned = wide.abs() <= tau
    # Pruned weights are replaced, so that no infinite derivative meets a zero.
    kept = operator(torch.where(pruned, 2 * tau + 1, wide), tau)
    return torch.where(pruned, 0.0, kept).to(w.dtype)
