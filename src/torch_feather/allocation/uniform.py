"""The same sparsity in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..methods.base import Setting
from ..prunable import convolutions
from ..weights.latent import LatentWeights, Segment
from .base import Allocation, Fitted, counts_of, cut_layers


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every layer is equally sparse, to less than one weight; the total is exact.

    Source: Zhu and Gupta (2017). What dense layers keep, the others make up for.

    Attributes:
        dense_first: the first convolution stays dense, as in Feather's experiments with this
            backbone (supplement, section 4). A network without convolutions has none.
        dense_depthwise: depthwise convolutions stay dense, as in Zhu and Gupta's MobileNet: they
            have few weights, of which each channel needs some.
    """

    on_shards = True

    dense_first: bool = False
    dense_depthwise: bool = False

    def fit(self, setting: Setting) -> Equal:
        """See `Allocation`. Layers that take no part are dense anyway."""
        found = convolutions(setting.model)
        dense = [name for name, _ in found[:1] if self.dense_first]
        if self.dense_depthwise:
            dense += [name for name, layer in found if layer.groups == layer.in_channels > 1]
        prunable = [
            0 if name in dense else shape.numel()
            for name, shape in zip(setting.names, setting.weights.shapes, strict=True)
        ]
        wanted = round(setting.sparsity * setting.weights.size)
        if wanted > sum(prunable):
            raise ConfigurationError(
                f"sparsity={setting.sparsity} asks for {wanted} zeros, but only {sum(prunable)} of "
                f"{setting.weights.size} weights are outside of the convolutions that are to stay "
                "dense. Prune them too (allocation='uniform', which is "
                "Uniform(dense_first=False)), or change the target."
            )
        return Equal(prunable)


class Equal(Fitted):
    """A `Uniform` that knows how many weights of each tensor may be pruned."""

    on_shards = True

    def __init__(self, prunable: Sequence[int]) -> None:
        self._prunable = tuple(prunable)

    def cuts(self, weights: LatentWeights, sparsity: Tensor) -> list[Segment]:
        """See `Fitted`."""
        prunable = weights.constant(("prunable", *self._prunable), self._on_device)
        # A model may begin with more zeros than its target, more even than these layers can have.
        total = (sparsity * weights.size).minimum(prunable.sum())
        return cut_layers(weights, counts_of(prunable * (total / prunable.sum()), total))

    def _on_device(self, weights: LatentWeights) -> Tensor:
        return torch.tensor(self._prunable, dtype=torch.float64, device=weights.device)
