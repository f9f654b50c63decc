"""Optimizers of a method's own parameters, such as learned thresholds.

They step after the user's optimizer and write fixed tensors in place. Whether the step is taken may
be known to the device alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..threads import for_each, scratch
from ..weights.latent import BLOCK, blocks, write_if
from ..weights.ranges import flat_arrays
from .base import Rate, no_learning_rate


@dataclass(frozen=True)
class Momentum:
    """SGD with momentum, as in PyTorch: v <- momentum v + g + decay x, x <- x - lr v.

    Attributes:
        rate: multiplier of the user's present learning rate.
        momentum: as in `torch.optim.SGD`.
        decay: weight decay, as in `torch.optim.SGD`.
        low, high: x is clamped between them.

    Raises:
        ConfigurationError: a negative rate or decay, or a momentum outside of [0, 1).

    Example:
        >>> x, velocity = torch.zeros(1, requires_grad=True), torch.zeros(1)
        >>> x.grad = torch.ones(1)
        >>> with torch.no_grad():
        ...     Momentum(rate=0.1).step(x, velocity, 1.0, True)
        >>> x.detach()
        tensor([-0.1000])
    """

    rate: float = 1.0
    momentum: float = 0.9
    decay: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.rate >= 0 or not 0 <= self.momentum < 1 or not self.decay >= 0:
            raise ConfigurationError(
                "For a method's own parameters, lr_multiplier and decay must be >= 0 and momentum "
                f"in [0, 1); got lr_multiplier={self.rate}, decay={self.decay}, "
                f"momentum={self.momentum}."
            )

    def step(self, x: Tensor, velocity: Tensor, lr: Rate, taken: bool | Tensor) -> None:
        """Step `x` along its `.grad`, in place. Without a gradient, nothing changes.

        Args:
            x, velocity: tensors of one shape and type.
            lr: the optimizer's learning rate.
            taken: whether the step was taken; a tensor if only the device knows.

        Raises:
            ConfigurationError: the optimizer has no learning rate.
        """
        if x.grad is None or taken is False:
            return
        if lr is None:
            raise no_learning_rate()
        v = velocity * self.momentum + x.grad
        if self.decay:
            v += self.decay * x
        stepped = (x - v * (lr * self.rate)).clamp(self.low, self.high)
        write_if(taken, [x, velocity], [stepped, v])


@dataclass(frozen=True)
class Adam:
    """Adam without weight decay, as in PyTorch (Kingma and Ba, ICLR 2015).

    Attributes:
        rate: the learning rate; it does not depend on the user's.
        mean_decay, square_decay: beta_1 and beta_2.
        epsilon: added to the root of the mean square.

    Raises:
        ConfigurationError: a negative rate or epsilon, or a decay outside of [0, 1).

    Example:
        >>> x, mean, square = torch.zeros(3, 1)
        >>> Adam(rate=0.1).step(torch.ones(1), x, mean, square, torch.tensor(1), torch.tensor(1.0))
        >>> x
        tensor([-0.1000])
    """

    rate: float = 0.001
    mean_decay: float = 0.9
    square_decay: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        decays = self.mean_decay, self.square_decay
        if not self.rate >= 0 or not self.epsilon >= 0 or not all(0 <= d < 1 for d in decays):
            raise ConfigurationError(
                "For Adam on a method's own parameters, lr and epsilon must be >= 0 and both "
                f"decays in [0, 1); got {self}."
            )

    def step(
        self, gradient: Tensor, x: Tensor, mean: Tensor, square: Tensor, step: Tensor,
        factor: Tensor,
    ) -> None:  # fmt: skip
        """Step `x` along `gradient`, in place.

        Args:
            gradient, x, mean, square: tensors of one shape and type; mean and square start at 0.
            step: steps taken, this one included.
            factor: multiplier of the learning rate.
        """
        # Bias correction, 1 - beta^t.
        of_mean, of_square = (
            1 - torch.pow(decay, step.double()) for decay in (self.mean_decay, self.square_decay)
        )
        rate, of_root = factor * self.rate / of_mean, of_square.sqrt()
        arrays = flat_arrays(gradient, x, mean, square)
        if arrays is not None:
            self._on_cpu(arrays, float(rate), float(of_root))
            return
        for g, w, m, s in blocks(gradient, x, mean, square):
            m.lerp_(g, 1 - self.mean_decay)
            s.mul_(self.square_decay).addcmul_(g, g, value=1 - self.square_decay)
            root = s.sqrt().div_(of_root).add_(self.epsilon)
            w.sub_(torch.div(m, root, out=root).mul_(rate))

    def _on_cpu(self, arrays: Sequence[np.ndarray], rate: float, of_root: float) -> None:
        """Step flat arrays block by block, with the memory of each thread."""

        def step(a: int) -> None:
            block = [array[a : a + BLOCK] for array in arrays]
            root = scratch("root", block[3].size, block[3].dtype)
            g, w, m, s, r = map(torch.from_numpy, (*block, root))
            m.lerp_(g, 1 - self.mean_decay)
            s.mul_(self.square_decay).addcmul_(g, g, value=1 - self.square_decay)
            np.sqrt(block[3], out=root)
            root /= of_root
            root += self.epsilon
            w.addcdiv_(m, r, value=-rate)

        for_each(step, range(0, arrays[0].size, BLOCK))
