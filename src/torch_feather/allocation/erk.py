"""Erdos-Renyi kernel: large layers are sparser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights.latent import LatentWeights, Segment
from .base import Fitted, counts_of, cut_layers


@dataclass(frozen=True)
class ERK(Fitted):
    """Each layer keeps a share in proportion to (sum of its dimensions) / (their product).

    Layers whose share would exceed 1 are dense, the others make up for it. The shares follow the
    target at each step; each layer is met to less than one weight, the total exactly.
    Source: Evci et al., Rigging the Lottery (2020), section 3.
    """

    on_shards = True

    def cuts(self, weights: LatentWeights, sparsity: Tensor) -> list[Segment]:
        """See `Fitted`."""
        sizes, shares, order = weights.constant(self, self._shares)
        total = sparsity * weights.size
        n, share = sizes[order], shares[order]
        # If the first m layers are dense, the factor is (kept - their weights) / (rest's weights
        # by share). The sum kept grows with the factor and is no more than this bound for any m:
        # so the right factor is the largest of them.
        dense = n.cumsum(0) - n
        rest = (share * n).flip(0).cumsum(0).flip(0)
        factor = ((weights.size - total - dense) / rest).amax()
        density = (factor * shares).clamp(max=1.0)
        return cut_layers(weights, counts_of((1.0 - density) * sizes, total))

    def _shares(self, weights: LatentWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Sizes and unscaled shares of the layers, float64, and their order by falling share."""
        share = torch.tensor([sum(s) / s.numel() for s in weights.shapes], dtype=torch.float64)
        order = share.argsort(descending=True)
        tensors = (weights.sizes.double(), share, order)
        return tuple(tensor.to(weights.device) for tensor in tensors)  # type: ignore[return-value]
