"""One ranking for the whole network, in which each layer's magnitudes are scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, nearest
from ..flops import count_flops
from ..latent import LatentWeights, Segment
from ..prunable import unwrap
from ..reparametrization import Setting
from ..selection import select
from .base import Allocation


class Scaled(Allocation):
    """The weights of smallest |w| times the scale of their layer are pruned; the total is exact.

    Args:
        scale: positive, one for each weight tensor.
    """

    def __init__(self, scale: Tensor):
        self._state: dict[str, Tensor | list[Tensor]] = {"scale": scale}

    @property
    def state(self) -> dict[str, Tensor | list[Tensor]]:
        """See `Allocation`."""
        return self._state

    def cuts(self, weights: LatentWeights, sparsity: Tensor) -> list[Segment]:
        """See `Allocation`."""
        scales = [scale.to(weights.wide) for scale in self._state["scale"]]
        k = (sparsity * weights.size).round().long()
        cut = select(partial(weights.scores, scales), k)
        pairs = zip(weights.spans, scales, strict=True)
        return [Segment(start, stop, cut, scale) for (start, stop), scale in pairs]


@dataclass(frozen=True)
class Sigma(Allocation):
    """Ranks |w| sqrt(sum of the dimensions of its tensor), so that large layers keep more.

    Source: ST-3 (Vanderschueren and De Vleeschouwer, WACV 2023), variant sigma.
    """

    def fit(self, setting: Setting) -> Scaled:
        """See `Allocation`."""
        weights = setting.weights
        scale = [math.sqrt(sum(view.shape)) for view in weights.views]
        return Scaled(torch.tensor(scale, dtype=weights.wide, device=weights.device))


@dataclass(frozen=True)
class FlopsBiased(Allocation):
    """Ranks |w| / c^gamma, with c the multiply-adds that each weight of its layer makes.

    Layers that work at high resolution, mostly early ones, lose more. gamma = 0 is `Global`.
    Source: the Feather supplement (section 6) says only that the global backbone was biased
    towards pruning earlier layers; this formula is ours.

    Attributes:
        gamma: the bias, >= 0; None: found so that the multiply-adds are within `macs`.
        macs: budget in multiply-adds per sample of the prunable weights, at the final sparsity.
            gamma is the least that meets it with the weights as they are when training begins.
        costs: multiply-adds per weight, by weight name.
        example_input: or an input to count them with, as for `count_flops`.
    """

    gamma: float | None = None
    macs: float | None = None
    costs: Mapping[str, float] | None = field(default=None, repr=False)
    example_input: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.gamma is None) == (self.macs is None):
            raise ConfigurationError(
                "Give either the bias gamma or a budget of multiply-adds, macs; got "
                f"gamma={self.gamma}, macs={self.macs}."
            )
        if (self.costs is None) == (self.example_input is None):
            raise ConfigurationError(
                "What a weight costs is needed once: example_input=, an input of the network to "
                "count with, or costs={name: multiply-adds per weight}."
            )
        if self.gamma is not None and not 0 <= self.gamma < math.inf:
            raise ConfigurationError(f"gamma must be a number >= 0, got {self.gamma!r}.")

    def fit(self, setting: Setting) -> Scaled:
        """See `Allocation`."""
        costs = self._costs(setting)
        gamma = self.gamma
        if gamma is None:
            assert self.macs is not None
            gamma = solve_gamma(setting.weights, costs, setting.sparsity, self.macs)
        return Scaled(_scale(setting.weights, costs, gamma))

    def _costs(self, setting: Setting) -> list[float]:
        if self.costs is not None:
            costs = dict(self.costs)
        else:
            model = unwrap(setting.model)
            names = {id(p): name for name, p in model.named_parameters()}
            costs = {}
            for layer in count_flops(model, self.example_input).layers:
                # By identity: a tied weight costs the sum of its uses.
                name = names[id(model.get_parameter(layer.name))]
                per_weight = layer.dense / math.prod(layer.weight_shape)
                costs[name] = costs.get(name, 0.0) + per_weight
        for name in setting.names:
            if not costs.get(name, 0) > 0:
                known = f"costs names no multiply-adds of {name}{nearest(name, costs)}"
                unused = f"{name} makes no multiply-add for this example_input."
                raise ConfigurationError(
                    f"{known if self.costs is not None else unused} Every prunable weight needs "
                    f"a cost above 0; leave it out of pruning otherwise: exclude={name!r}."
                )
        return [float(costs[name]) for name in setting.names]


def solve_gamma(
    weights: LatentWeights, costs: Sequence[float], sparsity: float, budget: float
) -> float:
    """The least bias at which the kept weights make at most `budget` multiply-adds.

    Raises:
        ConfigurationError: no bias meets the budget.
    """
    cost = torch.tensor(costs, dtype=torch.float64)
    share = torch.tensor(sparsity, dtype=torch.float64, device=weights.device)

    def macs(gamma: float) -> float:
        segments = Scaled(_scale(weights, costs, gamma)).cuts(weights, share)
        kept = (weights.sizes - weights.counts_pruned(segments)).cpu()
        return float((kept * cost).sum())

    low, high = 0.0, 1.0
    if macs(low) <= budget:
        return low
    while macs(high) > budget:
        low, high = high, 2 * high
        if high > 32:
            raise ConfigurationError(
                f"No bias keeps the network within macs={budget:,.0f} multiply-adds at "
                f"sparsity={sparsity}: with the strongest it makes {macs(low):,.0f}. Raise the "
                "budget or the sparsity."
            )
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if macs(middle) > budget else (low, middle)
    return high


def _scale(weights: LatentWeights, costs: Sequence[float], gamma: float) -> Tensor:
    """c^-gamma, with c relative to its geometric mean so that no score overflows."""
    logs = torch.tensor(costs, dtype=torch.float64).log()
    scale = (-gamma * (logs - logs.mean())).exp()
    return scale.to(weights.device, weights.wide)
