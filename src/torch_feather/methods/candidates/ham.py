"""Feather with hyperbolic aware minimization (HAM): a second, multiplicative step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..feather import feather
from .latent_update import UpdatedMethod, check_at_least_0
from .phases import Phases

LARGEST = 5.0  # bound on the exponent


@dataclass(frozen=True)
class HAM:
    """w exp(lr (-alpha sign(w) g - beta)), with the exponent bounded by ±5.

    To first order this is a gradient step whose rate is proportional to |w|, and a decay beta.
    Large weights move fast, small ones hardly.

    Source: Hyperbolic aware minimization (arXiv 2506.02630), with alpha = 200 and beta = 1e-3.

    Attributes:
        alpha: strength of the multiplicative step, >= 0.
        beta: decay, >= 0.

    Example:
        >>> HAM(alpha=1.0, beta=0.0)(torch.tensor([2.0]), torch.tensor([-1.0]), lr=0.1)
        tensor([2.2103])
    """

    alpha: float = 200.0
    beta: float = 1e-3

    def __post_init__(self) -> None:
        check_at_least_0(alpha=self.alpha, beta=self.beta)

    def __call__(self, w: Tensor, gradient: Tensor, lr: float | Tensor) -> Tensor:
        """Return the new latent weights."""
        exponent = (-self.alpha * w.sign() * gradient - self.beta) * lr
        return w * torch.exp(exponent.clamp(-LARGEST, LARGEST))


def feather_ham(
    *,
    sparsity: float,
    alpha: float = 20.0,
    beta: float = 0.0,
    theta: float | str = "auto",
    p: float = 3.0,
    end: float = 0.5,
) -> UpdatedMethod:
    """Return `feather` with a multiplicative step on the latent weights after each step.

    Args:
        sparsity: final fraction of zeros.
        alpha, beta: as for `HAM`. Published for dense and masked training with alpha = 200.
        theta, p: as for `feather`.
        end: fraction of training after which the sparsity has risen.

    Example:
        >>> feather_ham(sparsity=0.98, alpha=2.0).latent_update
        HAM(alpha=2.0, beta=0.0)
    """
    schedule = "cubic" if end == 0.5 else Phases(float(end), count=0, last=1.0)
    parts = vars(feather(sparsity=sparsity, theta=theta, p=p, schedule=schedule))
    return UpdatedMethod(**parts, latent_update=HAM(float(alpha), float(beta)))
