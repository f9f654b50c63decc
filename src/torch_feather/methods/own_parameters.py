"""The small optimizers of a method's own parameters.

They step after the user's optimizer, in fixed tensors, and also where only the device knows
whether the step is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .base import Rate


@dataclass(frozen=True)
class Momentum:
    """SGD with momentum, as in torch: v <- momentum v + g + decay x, x <- x - lr v.

    Attributes:
        rate: lr as a multiple of the user's present one.
        momentum, decay: as in torch.
        low, high: x is brought back between them.
    """

    rate: float = 1.0
    momentum: float = 0.9
    decay: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.rate >= 0 or not 0 <= self.momentum < 1 or not self.decay >= 0:
            raise ConfigurationError(
                "Of a method's own parameters the rate (a multiple of the optimizer's lr) and "
                f"decay are >= 0 and the momentum is in [0, 1), got {self}."
            )

    def step(self, x: Tensor, velocity: Tensor, rate: Rate, taken: bool | Tensor) -> None:
        """Steps `x` along its `.grad`, in place; without one it stays.

        Args:
            x, velocity: of one shape and type.
            rate: the optimizer's learning rate.
            taken: see `Reparametrization.advance`.
        """
        if x.grad is None or taken is False:
            return
        if rate is None:
            raise no_rate()
        v = velocity * self.momentum + x.grad
        if self.decay:
            v += self.decay * x
        stepped = (x - v * (rate * self.rate)).clamp(self.low, self.high)
        write_if(taken, [x, velocity], [stepped, v])


@dataclass(frozen=True)
class Adam:
    """Adam without decay, as in torch (Kingma & Ba, ICLR 2015).

    Attributes:
        rate: the learning rate, not a multiple of the user's.
        mean_decay, square_decay: beta_1 and beta_2.
        epsilon: added to the root of the mean square.
    """

    rate: float = 0.001
    mean_decay: float = 0.9
    square_decay: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        decays = self.mean_decay, self.square_decay
        if not self.rate >= 0 or not self.epsilon >= 0 or not all(0 <= d < 1 for d in decays):
            raise ConfigurationError(
                "Of Adam for a method's own parameters the rate and epsilon are >= 0 and both "
                f"decays in [0, 1), got {self}."
            )

    def step(
        self, gradient: Tensor, x: Tensor, mean: Tensor, square: Tensor, step: Tensor,
        factor: Tensor,
    ) -> None:  # fmt: skip
        """Steps `x` along `gradient`, in place.

        Args:
            gradient, x, mean, square: of one shape and type; the last two start at 0.
            step: steps taken, this one included.
            factor: on the rate.
        """
        mean.lerp_(gradient, 1 - self.mean_decay)
        square.mul_(self.square_decay).addcmul_(gradient, gradient, value=1 - self.square_decay)
        # 1 - beta^t, the share of the sum of weights that an average from 0 has by now.
        of_mean, of_square = (
            1 - torch.pow(decay, step.double()) for decay in (self.mean_decay, self.square_decay)
        )
        root = (square / of_square).sqrt_().add_(self.epsilon)
        x.sub_((mean / root).mul_(factor * self.rate / of_mean))


def no_rate() -> ConfigurationError:
    """The error where there is none to follow."""
    return ConfigurationError(
        "The optimizer has no learning rate (lr), of which that of the method's own parameters is "
        "a multiple. Give its parameter groups an 'lr' that follows the one in use, or take a "
        "method that learns no thresholds."
    )


def write_if(taken: bool | Tensor, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies values into targets if `taken`, which may be known to the device alone."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value if isinstance(taken, bool) else torch.where(taken, value, target))
