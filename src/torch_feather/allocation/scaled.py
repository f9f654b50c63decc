"""One ranking for the whole network, in which each layer's magnitudes are scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, nearest
from ..flops import count_flops
from ..latent import LatentWeights, Segment
from ..prunable import unwrap
from ..reparametrization import Setting
from .base import Allocation, Fitted


def cut_scaled(weights: LatentWeights, scale: Tensor, sparsity: Tensor) -> list[Segment]:
    """The weights of smallest |w| times the scale of their layer are pruned; the total is exact.

    Args:
        weights, sparsity: as for `Allocation.cuts`.
        scale: positive, one for each weight tensor.
    """
    scales = list(scale.to(weights.wide))
    k = (sparsity * weights.size).round().long()
    cut = weights.select(k, scales)
    pairs = zip(weights.spans, scales, strict=True)
    return [Segment(start, stop, cut, scale) for (start, stop), scale in pairs]


@dataclass(frozen=True)
class Sigma(Fitted):
    """Ranks |w| sqrt(sum of the dimensions of its tensor), so that large layers keep more.

    Source: ST-3 (Vanderschueren and De Vleeschouwer, WACV 2023), variant sigma.
    """

    on_shards = True

    def cuts(self, weights: LatentWeights, sparsity: Tensor) -> list[Segment]:
        """See `Allocation`."""
        return cut_scaled(weights, weights.constant(self, self._scale), sparsity)

    def _scale(self, weights: LatentWeights) -> Tensor:
        sums = [sum(shape) for shape in weights.shapes]
        return torch.tensor(sums, dtype=torch.float64, device=weights.device).sqrt()


@dataclass(frozen=True)
class FlopsBiased(Allocation):
    """Ranks |w| / c^gamma, with c what each weight of its layer costs: multiply-adds, or time.

    Layers that work at high resolution, mostly early ones, lose more. gamma = 0 is `Global`.
    Source: the Feather supplement (section 6) says only that the global backbone was biased
    towards pruning earlier layers; this formula is ours.

    Attributes:
        gamma: the bias, >= 0; None: found so that the kept weights cost at most `budget`.
        budget: what the prunable weights may cost at the final sparsity, in the unit of the costs:
            multiply-adds per sample with `example_input`. gamma is the least that meets it with
            the weights as they are when training begins.
        costs: of a weight, by weight name: such as `runtime.layer_milliseconds`.
        example_input: or an input to count multiply-adds with, as for `count_flops`.
    """

    gamma: float | None = None
    budget: float | None = None
    costs: Mapping[str, float] | None = field(default=None, repr=False)
    example_input: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.gamma is None) == (self.budget is None):
            raise ConfigurationError(
                "Give either the bias gamma or a budget in the unit of the costs; got "
                f"gamma={self.gamma}, budget={self.budget}."
            )
        if (self.costs is None) == (self.example_input is None):
            raise ConfigurationError(
                "What a weight costs is needed once: example_input=, an input of the network to "
                "count multiply-adds with, or costs={name: of each weight}."
            )
        if self.costs is not None and not isinstance(self.costs, Mapping):
            raise ConfigurationError(f"costs must be a number by weight name, got {self.costs!r}.")
        if self.gamma is not None and not 0 <= self.gamma < math.inf:
            raise ConfigurationError(f"gamma must be a number >= 0, got {self.gamma!r}.")

    def fit(self, setting: Setting) -> Biased:
        """See `Allocation`."""
        costs, weights = self._costs(setting), setting.weights
        gamma = self.gamma
        if gamma is None:
            assert self.budget is not None
            gamma = solve_gamma(weights, costs, setting.sparsity, self.budget)
        fitted = Biased(costs, gamma)
        # What was measured, or solved for these weights, would be another next time.
        if self.costs is not None:
            fitted.remember("log_costs", fitted.log_costs(weights).to(weights.wide))
        if self.gamma is None:
            fitted.remember("gamma", weights.sizes.to(weights.wide).fill_(gamma))
        return fitted

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
                known = f"costs names no cost above 0 of {name}{nearest(name, costs)}"
                unused = f"{name} makes no multiply-add for this example_input."
                raise ConfigurationError(
                    f"{known if self.costs is not None else unused} Every prunable weight needs "
                    f"a cost above 0; leave it out of pruning otherwise: exclude={name!r}."
                )
        return [float(costs[name]) for name in setting.names]


class Biased(Fitted):
    """A `FlopsBiased` whose costs and bias are known.

    Args:
        costs: of a weight, for each tensor.
        gamma: the bias.
    """

    on_shards = True

    def __init__(self, costs: Sequence[float], gamma: float):
        self._costs, self._gamma = costs, gamma
        self._state: dict[str, Tensor | list[Tensor]] = {}

    def remember(self, key: str, value: Tensor) -> None:
        """Keep `gamma` or `log_costs` in the state, with an entry for each weight tensor."""
        self._state[key] = value

    @property
    def state(self) -> dict[str, Tensor | list[Tensor]]:
        """See `Allocation`."""
        return self._state

    def cuts(self, weights: LatentWeights, sparsity: Tensor) -> list[Segment]:
        """See `Allocation`."""
        gamma = self._state.get("gamma", self._gamma)
        logs = self._state.get("log_costs")
        if logs is None:
            logs = weights.constant(("log_costs", *self._costs), self.log_costs)
        assert isinstance(logs, Tensor)
        assert not isinstance(gamma, list)
        return cut_scaled(weights, (-gamma * logs).exp(), sparsity)

    def log_costs(self, weights: LatentWeights) -> Tensor:
        """Relative to their geometric mean, so that no scale overflows."""
        logs = torch.tensor(self._costs, dtype=torch.float64).log()
        return (logs - logs.mean()).to(weights.device)


def solve_gamma(
    weights: LatentWeights, costs: Sequence[float], sparsity: float, budget: float
) -> float:
    """The least bias at which the kept weights cost at most `budget`.

    To 20 bits, so that float32 holds it.

    Raises:
        ConfigurationError: no bias meets the budget.
    """
    cost = torch.tensor(costs, dtype=torch.float64)
    share = torch.tensor(sparsity, dtype=torch.float64, device=weights.device)

    def spent(gamma: float) -> float:
        segments = Biased(costs, gamma).cuts(weights, share)
        kept = (weights.sizes - weights.counts_pruned(segments)).cpu()
        return float((kept * cost).sum())

    low, high = 0.0, 1.0
    if spent(low) <= budget:
        return low
    while spent(high) > budget:
        low, high = high, 2 * high
        if high > 32:
            raise ConfigurationError(
                f"No bias keeps the network within budget={budget:,.6g} at sparsity={sparsity}: "
                f"with the strongest its weights cost {spent(low):,.6g}. Raise the budget or the "
                "sparsity."
            )
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return high
