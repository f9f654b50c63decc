"""One threshold for the whole network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import devices
from ..errors import ConfigurationError
from ..methods.base import Setting
from ..weights.latent import LatentWeights, Segment
from .base import Fitted, cut_layers


@dataclass(frozen=True)
class Global(Fitted):
    """The weights of smallest magnitude, wherever they are, are pruned.

    Nothing is exempt. The share kept in each layer can be bounded, for networks of which a
    global ranking would empty a layer; the total stays exact, other layers make up for it.

    Source: Feather (BMVC 2023), section 3, the global pruning backbone; the bounds are ours.

    Attributes:
        min_density: every layer keeps at least this share of its weights, rounded up.
        max_density: every layer keeps at most this share once the target is reached, rounded up.
    """

    on_shards = True

    min_density: float = 0.0
    max_density: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_density <= self.max_density <= 1.0:
            raise ConfigurationError(
                "Bounds on the share kept per layer must satisfy 0 <= min_density <= max_density "
                f"<= 1, got min_density={self.min_density}, max_density={self.max_density}."
            )
        object.__setattr__(self, "min_density", float(self.min_density))
        object.__setattr__(self, "max_density", float(self.max_density))

    def cuts(self, weights: LatentWeights, sparsity: Tensor) -> list[Segment]:
        """See `Fitted`."""
        k = (sparsity * weights.size).round().long()
        if self.min_density == 0.0 and self.max_density == 1.0:
            return [Segment(0, weights.size, weights.select(k))]
        if not devices.synchronizes(k.device):
            # Bounds that do not bind cost one look; elsewhere looking would make the host wait.
            cut = weights.select(k)
            counts = weights.counts_pruned([Segment(0, weights.size, cut)])
            low, high = self._bounds_on_the_way(weights.sizes, k)
            if bool(((low <= counts) & (counts <= high)).all()):
                return [Segment(0, weights.size, cut)]
        return cut_layers(weights, self._bounded_counts(weights, k))

    def fit(self, setting: Setting) -> Global:
        """See `Fitted`."""
        sizes = [shape.numel() for shape in setting.weights.shapes]
        low = sum(n - math.ceil(n * self.max_density) for n in sizes)
        high = sum(n - math.ceil(n * self.min_density) for n in sizes)
        k = round(setting.sparsity * sum(sizes))
        if not low <= k <= high:
            raise ConfigurationError(
                f"With min_density={self.min_density} and max_density={self.max_density} between "
                f"{low} and {high} of {sum(sizes)} weights can be pruned, but sparsity="
                f"{setting.sparsity} asks for {k}. Widen the bounds or change the target."
            )
        return self

    def _bounds(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Least and most weights that may be pruned in each layer."""
        least_kept = (sizes.double() * self.min_density).ceil().long()
        most_kept = (sizes.double() * self.max_density).ceil().long()
        return sizes - most_kept, sizes - least_kept

    def _bounds_on_the_way(self, sizes: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds while only k weights are pruned: the cap tightens in step with k."""
        low, high = self._bounds(sizes)
        whole = low.sum().clamp_min(1)
        # low * k may exceed 64 bits. What is left after a near quotient does not, modulo 2^64.
        near = (low * (k.double() / whole)).long()
        return torch.minimum(low, near + (low * k - near * whole) // whole), high

    def _bounded_counts(self, weights: LatentWeights, k: Tensor) -> Tensor:
        """Weights to prune per layer: the clamped counts below one common magnitude, sum k.

        The common magnitude is found bit by bit: the largest v for which fewer than k weights,
        after clamping per layer, lie below v. What is still missing are weights equal to v, taken
        layer by layer.
        """
        integer = torch.int64 if weights.wide == torch.float64 else torch.int32
        bits = [weights.magnitudes(a, b).view(integer) for a, b in weights.spans]
        low, high = self._bounds_on_the_way(weights.sizes, k)
        k = k.minimum(high.sum())  # a model may begin with more zeros than its target

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
