"""Feather with a ranking that weighs each layer by the size of its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...allocation.scaled import scaled_cutoffs
from ...context import MethodContext
from ...errors import ConfigurationError
from ...weights.latent import LatentWeights, PerTensor, write_if
from ...weights.segments import Segment
from ..base import BoundMethod, Gradients, Pruning, Rate
from ..feather import feather
from ..magnitude import MagnitudePruning, Method


@dataclass(frozen=True)
class SensitivityMethod(Method):
    """A `Method` with one ranking of |w| r^gamma over all layers, r the RMS gradient of a layer.

    With gamma = 1, the score is the root of w^2 E[g^2], the diagonal approximation of the loss that
    pruning a weight costs (LeCun et al., Optimal Brain Damage, 1989, with the Fisher information
    for the Hessian), averaged within layers. With gamma = 0, it is |w|. The allocation must be
    global.

    Attributes:
        gamma: exponent of the RMS gradient.
        decay: of the moving average of squared gradients, per step.

    Example:
        >>> feather_sensitivity(sparsity=0.9, gamma=0.25).gamma
        0.25
    """

    gamma: float
    decay: float

    def __post_init__(self) -> None:
        if not -2 <= self.gamma <= 2 or not 0 <= self.decay < 1:
            raise ConfigurationError(
                f"gamma must lie in [-2, 2] and decay in [0, 1), got {self.gamma}, {self.decay}."
            )

    def bind(self, context: MethodContext) -> BoundMethod:
        return SensitivityPruning(context, self)


class SensitivityPruning(MagnitudePruning):
    """A `SensitivityMethod` on one model.

    State: `squares`, the moving average of the mean squared gradient of each tensor; 0 before the
    first step, when all layers weigh the same.

    Args:
        context: the model, its prunable weights, the target and the number of steps.
        method: the parts of the method.

    Example:
        >>> from torch import nn
        >>> weights = LatentWeights([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
        >>> context = MethodContext(nn.Linear(1, 1), ["a", "b"], weights, 0.5, 10)
        >>> bound = feather_sensitivity(sparsity=0.5, gamma=1.0).bind(context)
        >>> gradients, step = [torch.full((2,), 4.0), torch.ones(2)], torch.tensor(10)
        >>> bound.after_step(weights, bound.update(weights, step), gradients, step, 0.1, True)
        >>> pruning = bound.update(weights, step)  # scores 4, 8 and 3, 4
        >>> [bound.pruned(weights, pruning, i).tolist() for i in range(2)]
        [[True, False], [True, False]]
    """

    def __init__(self, context: MethodContext, method: SensitivityMethod):
        super().__init__(context, method)
        self.gamma, self.decay = method.gamma, method.decay
        squares = torch.zeros_like(context.weights.sizes, dtype=torch.float64)
        self.state["squares"] = PerTensor.of(squares)

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint} sensitivity {self.gamma} {self.decay}"

    def cutoffs(self, weights: LatentWeights, step: Tensor) -> list[Segment]:
        target = self.timetable.at(step, self.state["zeros"].flat, weights.size)
        return scaled_cutoffs(weights, self._scale(), target)

    def _scale(self) -> Tensor:
        """Return the factor on the magnitudes of each tensor; their geometric mean is about 1."""
        squares = self.state["squares"].flat
        known = squares > 0
        logs = torch.where(known, squares.clamp_min(1e-300).log() / 2, 0.0)
        centre = logs.sum() / known.sum().clamp_min(1)
        return torch.where(known, (self.gamma * (logs - centre)).clamp(-30, 30).exp(), 1.0)

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
        old = self.state["squares"].flat
        zero = old.new_zeros(())
        sums = [zero if g is None else g.double().square().sum() for g in gradients]
        new = weights.total(torch.stack(sums)) / weights.sizes.clamp_min(1)
        new = torch.where(old > 0, self.decay * old + (1 - self.decay) * new, new)
        write_if(taken, [old], [torch.where(new.isfinite() & (new > 0), new, old)])


def feather_sensitivity(
    *, sparsity: float, gamma: float = 0.5, decay: float = 0.99, theta: float | str = "auto"
) -> SensitivityMethod:
    """Return `feather` with a ranking of |w| r^gamma, r the RMS gradient of the layer.

    Args:
        sparsity: final fraction of zeros.
        gamma: exponent of the RMS gradient; 0 is `feather`, a negative one keeps fewer weights of
            layers with large gradients.
        decay: of the moving average of squared gradients, per step.
        theta: as for `feather`.

    Example:
        >>> feather_sensitivity(sparsity=0.98).operator
        Power(p=3.0)
    """
    parts = vars(feather(sparsity=sparsity, theta=theta))
    return SensitivityMethod(**parts, gamma=float(gamma), decay=float(decay))
