"""The same sparsity in every layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..latent import LatentWeights, Segment
from ..prunable import first_convolution
from ..reparametrization import Setting
from .base import Fitted, counts_of, cut_layers


@dataclass(frozen=True)
class Uniform(Fitted):
    """Every layer is equally sparse, to less than one weight; the total is exact.

    Source: Zhu and Gupta (2017). What the first convolution keeps, the other layers make up for.

    Attributes:
        dense_first: the first convolution stays dense, as in Feather's experiments with this
            backbone (supplement, section 4). A network without convolutions has none.
    """

    on_shards = True

    dense_first: bool = False
    _dense: int | None = field(default=None, init=False, repr=False)
    """The number of the weight tensor that stays dense in the model that this is fitted to."""

    def fit(self, setting: Setting) -> Uniform:
        """See `Fitted`. Where the first convolution takes no part, it is dense anyway."""
        first = first_convolution(setting.model) if self.dense_first else None
        fitted = replace(self)
        if first in setting.names:
            object.__setattr__(fitted, "_dense", setting.names.index(first))
        most = sum(fitted._prunable(setting.weights))
        wanted = round(setting.sparsity * setting.weights.size)
        if wanted > most:
            raise ConfigurationError(
                f"sparsity={setting.sparsity} asks for {wanted} zeros, but only {most} of "
                f"{setting.weights.size} weights are outside of the first convolution, which is to "
                "stay dense. Prune it too (allocation='uniform', which is "
                "Uniform(dense_first=False)), or change the target."
            )
        return fitted

    def cuts(self, weights: LatentWeights, sparsity: Tensor) -> list[Segment]:
        """See `Fitted`."""
        prunable = weights.constant(self, self._prunable_tensor)
        # A model may begin with more zeros than its target, more even than these layers can have.
        total = (sparsity * weights.size).minimum(prunable.sum())
        return cut_layers(weights, counts_of(prunable * (total / prunable.sum()), total))

    def _prunable(self, weights: LatentWeights) -> list[int]:
        """Weights of each layer that may be pruned."""
        sizes = [shape.numel() for shape in weights.shapes]
        if self._dense is not None:
            sizes[self._dense] = 0
        return sizes

    def _prunable_tensor(self, weights: LatentWeights) -> Tensor:
        return torch.tensor(self._prunable(weights), dtype=torch.float64, device=weights.device)
