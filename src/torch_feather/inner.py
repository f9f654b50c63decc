"""The small optimizers of a method's own parameters.

They step after the user's optimizer, in fixed tensors, and also where only the device knows
whether the step is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigurationError
from .reparametrization import Rate


@dataclass(frozen=True)
class Momentum:
    """SGD with momentum, as in torch: v <- momentum v + g + decay x, x <- x - lr v.

    Attributes:
        rate: lr as a multiple of the user's present one.
        momentum, decay: as in torch.
    """

    rate: float = 1.0
    momentum: float = 0.9
    decay: float = 0.0

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
            raise ConfigurationError(
                "The optimizer has no learning rate (lr), of which the method's own is a multiple."
            )
        v = velocity * self.momentum + x.grad
        if self.decay:
            v += self.decay * x
        write_if(taken, [x, velocity], [x - v * (rate * self.rate), v])


def write_if(taken: bool | Tensor, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies values into targets if `taken`, which may be known to the device alone."""
    for target, value in zip(targets, values, strict=True):
        target.copy_(value if isinstance(taken, bool) else torch.where(taken, value, target))
