"""One threshold for the whole network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import devices
from ..context import MethodContext
from ..errors import ConfigurationError
from ..scalars import count_of
from ..weights.latent import LatentWeights
from ..weights.passes import count_pruned
from ..weights.segments import Segment
from ..weights.selecting import select_weights
from .base import NO_STATE, FittedAllocation, State, layer_cutoffs


@dataclass(frozen=True)
class Global(FittedAllocation):
    """Prunes the weights of smallest magnitude in the whole network.

    All layers are pruned. Bounds on the density of each layer keep the ranking from emptying a
    layer; the total stays exact.

    Source: Feather (BMVC 2023), section 3, the global pruning backbone. The bounds are an addition
    of this package.

    Attributes:
        min_density: every layer keeps at least this fraction of its weights, rounded up.
        max_density: every layer keeps at most this fraction at the target, rounded up.

    Raises:
        ConfigurationError: not 0 <= min_density <= max_density <= 1.

    Example:
        >>> from torch_feather.weights.passes import count_pruned
        >>> weights = LatentWeights([torch.arange(10.0), torch.arange(10.0) + 5])
        >>> sparsity = torch.tensor(0.6).double()
        >>> count_pruned(weights, Global().cutoffs(weights, sparsity)).tolist()
        [9, 3]
        >>> count_pruned(weights, Global(min_density=0.3).cutoffs(weights, sparsity)).tolist()
        [7, 5]
    """

    on_shards = True

    min_density: float = 0.0
    max_density: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_density <= self.max_density <= 1.0:
            raise ConfigurationError(
                "Bounds on the density of each layer must satisfy 0 <= min_density <= max_density "
                f"<= 1, got min_density={self.min_density}, max_density={self.max_density}."
            )
        object.__setattr__(self, "min_density", float(self.min_density))
        object.__setattr__(self, "max_density", float(self.max_density))

    def cutoffs(
        self, weights: LatentWeights, sparsity: Tensor, state: State = NO_STATE
    ) -> list[Segment]:
        k = count_of(sparsity, weights.size)
        if self.min_density == 0.0 and self.max_density == 1.0:
            return [Segment(0, weights.size, select_weights(weights, k))]
        if not devices.synchronizes(k.device):
            # Try without bounds first. On a device the check would synchronize the host.
            unbounded = [Segment(0, weights.size, select_weights(weights, k))]
            counts = count_pruned(weights, unbounded)
            low, high = self._bounds_at(weights.sizes, k)
            if bool(((low <= counts) & (counts <= high)).all()):
                return unbounded
        return layer_cutoffs(weights, self._bounded_counts(weights, k))

    def fit(self, context: MethodContext) -> Global:
        sizes = [shape.numel() for shape in context.weights.shapes]
        low = sum(n - math.ceil(n * self.max_density) for n in sizes)
        high = sum(n - math.ceil(n * self.min_density) for n in sizes)
        k = round(context.sparsity * sum(sizes))
        if not low <= k <= high:
            raise ConfigurationError(
                f"With min_density={self.min_density} and max_density={self.max_density} between "
                f"{low} and {high} of {sum(sizes)} weights can be pruned, but sparsity="
                f"{context.sparsity} requires {k}. Widen the bounds or change the target."
            )
        return self

    def _bounds(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and most weights that may be pruned in each layer."""
        least_kept = (sizes.double() * self.min_density).ceil().long()
        most_kept = (sizes.double() * self.max_density).ceil().long()
        return sizes - most_kept, sizes - least_kept

    def _bounds_at(self, sizes: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bounds while k weights are pruned: max_density tightens with k."""
        low, high = self._bounds(sizes)
        whole = low.sum().clamp_min(1)
        # low * k may exceed 64 bits. The remainder of a near quotient does not, modulo 2^64.
        near = (low * (k.double() / whole)).long()
        return torch.minimum(low, near + (low * k - near * whole) // whole), high

    def _bounded_counts(self, weights: LatentWeights, k: Tensor) -> Tensor:
        """Return weights to prune per layer: clamped counts below one common magnitude, sum k.

        The common magnitude v is found bit by bit. It is the largest one below which fewer than k
        weights lie, after clamping per layer. The missing ones equal v and are taken layer by
        layer.
        """
        integer = torch.int64 if weights.wide == torch.float64 else torch.int32
        bits = [weights.magnitudes(a, b).view(integer) for a, b in weights.spans]
        low, high = self._bounds_at(weights.sizes, k)
        k = k.minimum(high.sum())  # a model may start with more zeros than its target

        def below(v: Tensor) -> Tensor:
            counts = weights.total(torch.stack([(layer < v).sum() for layer in bits]))
            return torch.maximum(torch.minimum(counts, high), low)

        v = torch.zeros((), dtype=integer, device=k.device)
        for bit in range(torch.iinfo(integer).bits - 2, -1, -1):
            candidate = v | (1 << bit)
            v = torch.where(below(candidate).sum() < k, candidate, v)
        counts, room = below(v), below(v + 1) - below(v)
        before = room.cumsum(0) - room
        return counts + torch.minimum((k - counts.sum() - before).clamp_min(0), room)
