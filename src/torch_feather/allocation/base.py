"""What an allocation is, and what those that decide layer by layer share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..methods.base import Setting
from ..weights.latent import LatentWeights, Segment


class Allocation(ABC):
    """How a target is shared among the layers; `repr` is its identity.

    Attributes:
        on_shards: whether its cuts are those of the whole where weights are spread over processes.
    """

    on_shards: ClassVar[bool] = False

    @abstractmethod
    def fit(self, setting: Setting) -> Fitted:
        """This allocation for one model: checked, and with all that it needs of the model.

        Raises:
            ConfigurationError: the layers cannot meet the target.
        """


class Fitted(Allocation):
    """An allocation that finds cuts; most need nothing of the model, and fit any.

    Attributes:
        follows: whether `follow` has anything to do.
    """

    follows: ClassVar[bool] = False

    def fit(self, setting: Setting) -> Fitted:
        """See `Allocation`."""
        return self

    @abstractmethod
    def cuts(self, weights: LatentWeights, sparsity: Tensor) -> list[Segment]:
        """Segments that cover all weights once, and make them as sparse as asked.

        Args:
            weights: the latent weights; their `spans` are the layers.
            sparsity: share of zeros wanted, 0-dimensional float64 in [0, 1). Never read by the
                host on accelerators. A count is round(sparsity * n), half to even.
        """

    @property
    def state(self) -> dict[str, Tensor | list[Tensor]]:
        """What cannot be computed anew after a restart, see `Reparametrization.state`."""
        return {}

    def follow(self, weights: LatentWeights, sparsity: float, taken: bool | Tensor) -> None:
        """The state becomes that of stepped weights.

        Args:
            weights: as for `cuts`.
            sparsity: the final one.
            taken: see `Reparametrization.advance`.
        """

    def excess(self, weights: LatentWeights, kept: Tensor) -> str | None:
        """What this allocation promises and does not keep, as the end of a sentence.

        Args:
            weights: as for `cuts`.
            kept: the share that is kept of each tensor, float64.
        """
        return None


def counts_of(amounts: Tensor, total: Tensor) -> Tensor:
    """Whole numbers near `amounts`, each less than one off, whose sum is round(total).

    Args:
        amounts: how many weights of each layer to prune, float64, not rounded; they sum to total.
        total: 0-dimensional float64.
    """
    reached = torch.minimum(amounts.cumsum(0), total)
    reached[-1] = total
    reached = reached.round().long()
    return reached.diff(prepend=torch.zeros_like(reached[:1]))


def cut_layers(weights: LatentWeights, counts: Tensor) -> list[Segment]:
    """In each layer the `counts` smallest magnitudes lie below its cut."""
    pairs = zip(weights.spans, weights.select_each(counts), strict=True)
    return [Segment(start, stop, cut) for (start, stop), cut in pairs]
