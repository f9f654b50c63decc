"""Erdos-Renyi kernel (ERK): large layers are sparser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights.latent import LatentWeights
from ..weights.segments import Segment
from .base import NO_STATE, FittedAllocation, State, layer_cutoffs, round_counts


@dataclass(frozen=True)
class ERK(FittedAllocation):
    """Gives each layer a density in proportion to (sum of its dimensions) / (their product).

    Layers whose density would exceed 1 are dense, and the others are sparser for it. The densities
    follow the scheduled sparsity. Each layer's count is less than 1 off; the total is exact.

    Source: Evci et al., Rigging the Lottery (2020), section 3.

    Example:
        >>> from torch_feather.weights.passes import count_pruned
        >>> weights = LatentWeights([torch.randn(10, 10), torch.randn(20, 20)])
        >>> count_pruned(weights, ERK().cutoffs(weights, torch.tensor(0.9).double())).tolist()
        [83, 367]
    """

    on_shards = True

    def cutoffs(
        self, weights: LatentWeights, sparsity: Tensor, state: State = NO_STATE
    ) -> list[Segment]:
        sizes, densities, order = weights.constant(self, self._densities)
        total = sparsity * weights.size
        n, density = sizes[order], densities[order]
        # If the first m layers are dense, the factor is (kept - their weights) / (sum of n *
        # density over the rest). The kept sum grows with the factor. It is at most this bound for
        # every m, so the right factor is the largest of them.
        dense = n.cumsum(0) - n
        rest = (density * n).flip(0).cumsum(0).flip(0)
        factor = ((weights.size - total - dense) / rest).amax()
        scaled = (factor * densities).clamp(max=1.0)
        return layer_cutoffs(weights, round_counts((1.0 - scaled) * sizes, total))

    def _densities(self, weights: LatentWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Return sizes and unscaled densities, float64, and their order by falling density."""
        density = torch.tensor([sum(s) / s.numel() for s in weights.shapes], dtype=torch.float64)
        order = density.argsort(descending=True)
        tensors = (weights.sizes.double(), density, order)
        return tuple(tensor.to(weights.device) for tensor in tensors)  # type: ignore[return-value]
