"""The same sparsity in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..context import MethodContext
from ..errors import ConfigurationError
from ..prunable import convolutions
from ..weights.latent import LatentWeights
from ..weights.segments import Segment
from .base import NO_STATE, Allocation, FittedAllocation, State, layer_cutoffs, round_counts


@dataclass(frozen=True)
class Uniform(Allocation):
    """Gives every layer the same sparsity: counts are less than 1 off, the total is exact.

    If some layers stay dense, the others are sparser for it. Source: Zhu and Gupta (2017).

    Attributes:
        dense_first: the first convolution stays dense, as in Feather's experiments with this
            backbone (supplement, section 4).
        dense_depthwise: depthwise convolutions stay dense, as in Zhu and Gupta's MobileNet.

    Example:
        >>> from torch_feather.weights.passes import count_pruned
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
        >>> weights = LatentWeights([model[0].weight, model[1].weight])
        >>> context = MethodContext(model, ["0.weight", "1.weight"], weights, 0.5, 100)
        >>> fitted = Uniform(dense_first=True).fit(context)
        >>> count_pruned(weights, fitted.cutoffs(weights, torch.tensor(0.5).double())).tolist()
        [0, 90]
    """

    on_shards = True

    dense_first: bool = False
    dense_depthwise: bool = False

    def fit(self, context: MethodContext) -> FittedUniform:
        found = convolutions(context.model)
        dense = [name for name, _ in found[:1] if self.dense_first]
        if self.dense_depthwise:
            dense += [name for name, layer in found if layer.groups == layer.in_channels > 1]
        prunable = [
            0 if name in dense else shape.numel()
            for name, shape in zip(context.names, context.weights.shapes, strict=True)
        ]
        target = round(context.sparsity * context.weights.size)
        if target > sum(prunable):
            raise ConfigurationError(
                f"sparsity={context.sparsity} means {target} zeros, but only {sum(prunable)} of "
                f"{context.weights.size} weights are outside of the convolutions that stay dense. "
                "Prune them too (allocation='uniform', which is Uniform(dense_first=False)), or "
                "lower the target."
            )
        return FittedUniform(prunable)


class FittedUniform(FittedAllocation):
    """A `Uniform` for one model.

    Args:
        prunable: how many weights of each tensor may be pruned.

    Example:
        >>> from torch_feather.weights.passes import count_pruned
        >>> weights = LatentWeights([torch.ones(10), torch.ones(30)])
        >>> fitted = FittedUniform(prunable=[10, 30])
        >>> count_pruned(weights, fitted.cutoffs(weights, torch.tensor(0.5).double())).tolist()
        [5, 15]
    """

    on_shards = True

    def __init__(self, prunable: Sequence[int]) -> None:
        self._prunable = tuple(prunable)

    def cutoffs(
        self, weights: LatentWeights, sparsity: Tensor, state: State = NO_STATE
    ) -> list[Segment]:
        prunable = weights.constant(("prunable", *self._prunable), self._on_device)
        # A model may start with more zeros than its target, even more than these layers can have.
        total = (sparsity * weights.size).minimum(prunable.sum())
        return layer_cutoffs(weights, round_counts(prunable * (total / prunable.sum()), total))

    def _on_device(self, weights: LatentWeights) -> Tensor:
        return torch.tensor(self._prunable, dtype=torch.float64, device=weights.device)
