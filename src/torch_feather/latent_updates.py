"""Latent updates: elementwise changes of the latent weights after an optimizer's step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigurationError
from .threads import scratch

LARGEST = 5.0  # bound on the exponent of HAM


class LatentUpdate(ABC):
    """Changes each latent weight by its gradient; its `repr` is part of a method's fingerprint.

    Example:
        >>> class Decay(LatentUpdate):
        ...     def __call__(self, w, gradient, lr):
        ...         return w * (1 - 0.1 * lr)
        >>> Decay()(torch.tensor([1.0]), torch.tensor([0.0]), 1.0)
        tensor([0.9000])
    """

    @abstractmethod
    def __call__(self, w: Tensor, gradient: Tensor, lr: float | Tensor) -> Tensor:
        """Return the new latent weights.

        Args:
            w: latent weights after the optimizer's step, any shape, float32 or float64.
            gradient: dL/dw of this step, as the optimizer saw it; of the same shape and type.
            lr: learning rate of the weights' parameter group; a tensor is 0-dimensional.
        """

    def write(self, w: np.ndarray, gradient: np.ndarray, lr: float) -> None:
        """Change a block of weights on a CPU in place. An override may be faster.

        Args:
            w: latent weights, flat, float32 or float64.
            gradient: of the same size and type.
            lr: their learning rate.
        """
        np.copyto(w, self(torch.from_numpy(w), torch.from_numpy(gradient), lr).numpy())


@dataclass(frozen=True)
class HAM(LatentUpdate):
    """w exp(lr (-alpha sign(w) g - beta)), with the exponent bounded by ±5.

    To first order this is a gradient step whose rate is proportional to |w|, and a decay beta.
    Large weights move fast, small ones hardly. No weight changes its sign, and 0 stays 0.

    `write` and the formula differ in the last bits, by the exponential of NumPy and of PyTorch.

    Source: Hyperbolic aware minimization (arXiv 2506.02630), with alpha = 200 and beta = 1e-3.

    Attributes:
        alpha: strength of the multiplicative step, >= 0.
        beta: decay, >= 0.

    Raises:
        ConfigurationError: alpha or beta is not a finite number >= 0.

    Example:
        >>> HAM(alpha=1.0, beta=0.0)(torch.tensor([2.0]), torch.tensor([-1.0]), lr=0.1)
        tensor([2.2103])
    """

    alpha: float = 200.0
    beta: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ConfigurationError(f"{name} must be a number >= 0, got {value!r}.")
            object.__setattr__(self, name, float(value))  # 20 and 20.0 are one method

    def __call__(self, w: Tensor, gradient: Tensor, lr: float | Tensor) -> Tensor:
        exponent = w.sign() * gradient * (-self.alpha * lr) - self.beta * lr
        return w * exponent.clamp(-LARGEST, LARGEST).exp()

    def write(self, w: np.ndarray, gradient: np.ndarray, lr: float) -> None:
        number, integer = w.dtype.type, np.dtype(f"i{w.itemsize}")
        exponent = scratch("exponent", w.size, w.dtype)
        signed = exponent.view(integer)
        # sign(w) g by bits, in less time than NumPy needs for a sign. If w is 0, it stays 0.
        np.bitwise_and(w.view(integer), np.iinfo(integer).min, out=signed)
        np.bitwise_xor(signed, gradient.view(integer), out=signed)
        with np.errstate(all="ignore"):
            exponent *= number(-self.alpha * lr)
            if self.beta:
                exponent -= number(self.beta * lr)
            np.clip(exponent, number(-LARGEST), number(LARGEST), out=exponent)
            w *= np.exp(exponent, out=exponent)
