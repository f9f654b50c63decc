"""The context that a method is bound to: model, prunable weights, target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .weights.latent import LatentWeights


@dataclass(frozen=True)
class MethodContext:
    """The model, its prunable weights by position, and the target of one training run.

    Attributes:
        model: the model.
        names: names of the prunable weight tensors.
        weights: their latent weights, in the same order.
        sparsity: final fraction of zeros among them.
        total_steps: optimizer steps of the whole training.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> weights = LatentWeights([model.weight])
        >>> context = MethodContext(model, ["weight"], weights, sparsity=0.5, total_steps=100)
        >>> round(context.sparsity * context.weights.size)  # target number of zeros
        4
    """

    model: nn.Module
    names: Sequence[str]
    weights: LatentWeights
    sparsity: float
    total_steps: int
