"""Which threshold for which tensor: how a target is shared among the layers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..latent import LatentWeights, Segment
from .global_ import Global

__all__ = ["Allocation", "Global"]


class Allocation(Protocol):
    """Finds the cuts that make the latent weights as sparse as asked."""

    def cuts(self, weights: LatentWeights, sparsity: Tensor) -> list[Segment]:
        """Segments that cover all weights once, in flat order.

        Args:
            weights: the latent weights; their `spans` are the layers.
            sparsity: share of zeros wanted, 0-dimensional float64 in [0, 1). Never read by the
                host on accelerators. A count is round(sparsity * n), half to even.
        """

    def check(self, sizes: list[int], sparsity: float) -> None:
        """Raises ConfigurationError where layers of these sizes cannot meet the target."""
