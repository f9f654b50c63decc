"""A method of four parts with a fifth: a change of the latent weights after each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...context import MethodContext
from ...errors import ConfigurationError
from ...weights.latent import LatentWeights, write_if
from ..base import BoundMethod, Gradients, Pruning, Rate, no_learning_rate
from ..magnitude import MagnitudePruning, Method


class LatentUpdate(Protocol):
    """An elementwise change of latent weights; its `repr` is part of a method's fingerprint.

    Example:
        >>> import torch
        >>> def decay(w, gradient, lr):
        ...     return w * (1 - lr * 0.1)
        >>> decay(torch.tensor([1.0]), None, 1.0)
        tensor([0.9000])
    """

    def __call__(self, w: Tensor, gradient: Tensor, lr: float | Tensor) -> Tensor:
        """Return the new latent weights.

        Args:
            w: the latent weights after the optimizer's step.
            gradient: dL/dw of this step, as the optimizer saw it.
            lr: the optimizer's learning rate.
        """


@dataclass(frozen=True)
class UpdatedMethod(Method):
    """A `Method` with a change of the latent weights after each step.

    Attributes:
        latent_update: the change.

    Example:
        >>> from torch_feather.methods import feather
        >>> from torch_feather.methods.candidates.ham import HAM
        >>> UpdatedMethod(**vars(feather(sparsity=0.9)), latent_update=HAM(2.0)).operator
        Power(p=3.0)
    """

    latent_update: LatentUpdate

    def bind(self, context: MethodContext) -> BoundMethod:
        return UpdatedPruning(context, self)


class UpdatedPruning(MagnitudePruning):
    """An `UpdatedMethod` on one model.

    Args:
        context: the model, its prunable weights, the target and the number of steps.
        method: the parts of the method.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch_feather.methods.candidates import feather_ham
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> bound = feather_ham(sparsity=0.5, alpha=1.0, beta=0.0).bind(context)
        >>> gradients, step = [torch.full((1, 4), -1.0)], torch.tensor(1)
        >>> bound.after_step(weights, bound.update(weights, step), gradients, step, 0.1, True)
        >>> weights.views[0] / torch.tensor([1.0, 2.0, 3.0, 4.0])  # exp(0.1)
        tensor([[1.1052, 1.1052, 1.1052, 1.1052]])
    """

    def __init__(self, context: MethodContext, method: UpdatedMethod):
        super().__init__(context, method)
        self.latent_update = method.latent_update

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint} {self.latent_update!r}"

    def after_step(
        self,
        weights: LatentWeights,
        pruning: Pruning,
        gradients: Gradients,
        step: Tensor,
        lr: Rate,
        taken: bool | Tensor,
    ) -> None:
        super().after_step(weights, pruning, gradients, step, lr, taken)
        if lr is None:
            raise no_learning_rate()
        for w, gradient in zip(weights.views, gradients, strict=True):
            if gradient is not None:
                write_if(taken, [w], [self.latent_update(w, gradient, lr).to(w.dtype)])


def check_at_least_0(**values: float) -> None:
    """Raise ConfigurationError for a negative number.

    Args:
        **values: numbers by the name of the option.

    Example:
        >>> check_at_least_0(alpha=1.0)
    """
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ConfigurationError(f"{name} must be a number >= 0, got {value!r}.")
