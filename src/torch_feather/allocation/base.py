"""The interface of allocations, and functions of allocations that decide layer by layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..context import MethodContext
from ..weights.latent import LatentWeights
from ..weights.segments import Segment
from ..weights.selecting import select_each

State = Mapping[str, Tensor]
"""Entries of a method's state with one number per weight tensor, by name."""

NO_STATE: State = {}


class Allocation(ABC):
    """Divides a target among the layers; its `repr` is part of a method's fingerprint.

    Attributes:
        on_shards: whether its cutoffs are global if the weights are sharded over processes.

    Example:
        >>> class FirstHalf(FittedAllocation):  # prunes the first tensor to 50%
        ...     def cutoffs(self, weights, sparsity, state=NO_STATE):
        ...         counts = torch.zeros_like(weights.sizes)
        ...         counts[0] = weights.sizes[0] // 2
        ...         return layer_cutoffs(weights, counts)
        >>> weights = LatentWeights([torch.tensor([2.0, 1.0]), torch.ones(2)])
        >>> float(FirstHalf().cutoffs(weights, torch.tensor(0.25))[0].threshold)
        1.0
    """

    on_shards: ClassVar[bool] = False

    @abstractmethod
    def fit(self, context: MethodContext) -> FittedAllocation:
        """Return this allocation for one model, with all that it needs of the model.

        Args:
            context: the model, its weights and the target.

        Raises:
            ConfigurationError: the layers cannot meet the target.
        """


class FittedAllocation(Allocation):
    """An allocation that finds cutoffs.

    Most allocations need no facts of the model; they subclass this class and fit any model.

    Attributes:
        follows: whether `next_state` depends on the weights of each step.

    Example:
        >>> from torch_feather.allocation import Global
        >>> weights = LatentWeights([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 4.0])])
        >>> segments = Global().cutoffs(weights, torch.tensor(0.5).double())
        >>> float(segments[0].threshold)
        2.0
    """

    follows: ClassVar[bool] = False

    def fit(self, context: MethodContext) -> FittedAllocation:
        return self

    @abstractmethod
    def cutoffs(
        self, weights: LatentWeights, sparsity: Tensor, state: State = NO_STATE
    ) -> list[Segment]:
        """Return segments that cover all weights once and have the target sparsity.

        Args:
            weights: the latent weights; their `spans` are the layers.
            sparsity: target fraction of zeros, 0-dimensional float64 in [0, 1). Counts are
                round(sparsity * n), half to even. On accelerators the host must not read it.
            state: the method's state, which includes `initial_state`.
        """

    def initial_state(self, context: MethodContext) -> dict[str, Tensor]:
        """Return what cannot be computed again after a restart, by name.

        Returns:
            Tensors with one number per weight tensor.
        """
        return {}

    def next_state(
        self, weights: LatentWeights, sparsity: float, state: State
    ) -> dict[str, Tensor]:
        """Return the entries of the state that change after a step, without writing any.

        Args:
            weights: the latent weights after the step.
            sparsity: the final sparsity.
            state: the present state.
        """
        return {}

    def violation(self, weights: LatentWeights, kept: Tensor, state: State) -> str | None:
        """Return a goal of this allocation that is not met, as the end of a sentence; else None.

        Args:
            weights: the latent weights.
            kept: density of each tensor, float64.
            state: the present state.
        """
        return None


def round_counts(amounts: Tensor, total: Tensor) -> Tensor:
    """Return integers near `amounts`, each less than 1 off, whose sum is round(total).

    Args:
        amounts: unrounded numbers of weights to prune per layer, float64; they sum to total.
        total: 0-dimensional float64.

    Example:
        >>> round_counts(torch.tensor([1.5, 1.5]).double(), torch.tensor(3.0).double()).tolist()
        [2, 1]
    """
    reached = torch.minimum(amounts.cumsum(0), total)
    reached[-1] = total
    reached = reached.round().long()
    return reached.diff(prepend=torch.zeros_like(reached[:1]))


def layer_cutoffs(weights: LatentWeights, counts: Tensor) -> list[Segment]:
    """Return cutoffs that prune the `counts` smallest magnitudes of each layer.

    Example:
        >>> weights = LatentWeights([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 4.0])])
        >>> [float(s.threshold) for s in layer_cutoffs(weights, torch.tensor([1, 1]))]
        [1.0, 2.0]
    """
    pairs = zip(weights.spans, select_each(weights, counts), strict=True)
    return [Segment(start, stop, cutoff) for (start, stop), cutoff in pairs]
