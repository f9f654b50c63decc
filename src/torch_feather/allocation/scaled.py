"""One ranking for the whole network, in which each layer's magnitudes are scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import devices
from ..errors import ConfigurationError, nearest
from ..measure.flops import count_flops
from ..methods.base import Setting
from ..methods.own_parameters import write_if
from ..prunable import unwrap
from ..weights.latent import LatentWeights, Segment
from .base import Allocation, Fitted

# A bias that is solved for is a multiple of 1 / 256, so that it often stays what it was.
UNIT = 2.0**-8
STRONGEST = 32 * 256
# Biases that are tried after a step where the host may not read what comes out.
TRIALS = 8
# Largest exponent of a scale: float32 holds its product with any weight.
LARGEST = 50.0


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
        gamma: the bias, >= 0; None: after every step the least one, in units of 1 / 256, with
            which the weights of that moment would cost at most `budget` at the final sparsity.
        budget: what the prunable weights may cost at the final sparsity, in the unit of the costs:
            multiply-adds per sample with `example_input`.
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
        costs = self._costs(setting)
        if self.gamma is not None:
            return Biased(setting.weights, costs, self.gamma)
        assert self.budget is not None
        return Budgeted(setting, costs, self.budget)

    def _costs(self, setting: Setting) -> list[float]:
        costs = self._counted(setting) if self.costs is None else self.costs
        for name in setting.names:
            if not costs.get(name, 0) > 0:
                known = f"costs names no cost above 0 of {name}{nearest(name, costs)}"
                unused = f"{name} makes no multiply-add for this example_input."
                raise ConfigurationError(
                    f"{known if self.costs is not None else unused} Every prunable weight needs "
                    f"a cost above 0; leave it out of pruning otherwise: exclude={name!r}."
                )
        return [float(costs[name]) for name in setting.names]

    def _counted(self, setting: Setting) -> dict[str, float]:
        """Multiply-adds of a weight, by name; a tied one makes those of all its uses."""
        model = unwrap(setting.model)
        names = {id(model.get_parameter(name)): name for name in setting.names}
        costs: dict[str, float] = {}
        for layer in count_flops(model, self.example_input).layers:
            name = names.get(id(model.get_parameter(layer.name)))
            if name is not None:
                per_weight = layer.dense / math.prod(layer.weight_shape)
                costs[name] = costs.get(name, 0.0) + per_weight
        return costs


class Biased(Fitted):
    """A `FlopsBiased` whose costs and bias are known.

    State: `costs`, of a weight of each tensor: what was measured would be another next time, and
    another example input has other counts.
    """

    on_shards = True

    def __init__(self, weights: LatentWeights, costs: Sequence[float], gamma: float = 0.0):
        self._gamma = gamma
        measured = torch.tensor(costs, dtype=torch.float64).to(weights.device, weights.wide)
        self._state: dict[str, Tensor | list[Tensor]] = {"costs": measured}

    @property
    def state(self) -> dict[str, Tensor | list[Tensor]]:
        """See `Fitted`."""
        return self._state

    @property
    def costs(self) -> Tensor:
        """Of a weight of each tensor, float64."""
        costs = self._state["costs"]
        assert isinstance(costs, Tensor)
        return costs.double()

    def cuts(self, weights: LatentWeights, sparsity: Tensor) -> list[Segment]:
        """See `Fitted`."""
        return self.cuts_with(self._gamma, weights, sparsity)

    def cuts_with(
        self, gamma: float | Tensor, weights: LatentWeights, sparsity: Tensor
    ) -> list[Segment]:
        """The cuts of a ranking with this bias."""
        logs = self.costs.log()
        exponents = -gamma * (logs - logs.mean())
        # A bias beyond all measure prunes the dear layers first, in the order of their costs.
        exponents *= (LARGEST / exponents.abs().amax()).clamp(max=1.0)
        return cut_scaled(weights, exponents.exp(), sparsity)


class Budgeted(Biased):
    """A `FlopsBiased` whose bias follows the weights, so that the kept ones meet a budget.

    A larger bias exchanges dear weights for cheaper ones, never the other way: so the cost falls
    with it, and the least bias that meets the budget can be searched for.

    State: `gamma` too, the same for all tensors.
    """

    follows = True

    def __init__(self, setting: Setting, costs: Sequence[float], budget: float):
        weights, model = setting.weights, unwrap(setting.model)
        super().__init__(weights, costs)
        self._budget = budget
        # Where there is a pattern, `weights` are units of several.
        self._sizes = tuple(model.get_parameter(name).numel() for name in setting.names)
        self._state["gamma"] = weights.sizes.to(weights.wide).zero_()
        self._gammas.copy_(self._search(weights, setting.sparsity, look=True))
        if excess := self.excess(weights, self._kept(self._gammas[0], weights, setting.sparsity)):
            raise ConfigurationError(
                f"No bias keeps the network within the budget at sparsity={setting.sparsity}: "
                f"with the strongest {excess} Raise the budget or the sparsity."
            )

    @property
    def _gammas(self) -> Tensor:
        gammas = self._state["gamma"]
        assert isinstance(gammas, Tensor)
        return gammas

    def cuts(self, weights: LatentWeights, sparsity: Tensor) -> list[Segment]:
        """See `Fitted`."""
        return self.cuts_with(self._gammas.double(), weights, sparsity)

    def excess(self, weights: LatentWeights, kept: Tensor) -> str | None:
        """See `Fitted`."""
        cost = self._cost(weights, kept)
        if not bool(self._is_over(cost)):
            return None
        return f"its weights cost {float(cost):,.6g}, more than the budget of {self._budget:,.6g}."

    def follow(self, weights: LatentWeights, sparsity: float, taken: bool | Tensor) -> None:
        """See `Fitted`."""
        found = self._search(weights, sparsity, look=not devices.synchronizes(weights.device))
        write_if(taken, [self._gammas], [found.to(weights.wide).expand_as(self._gammas)])

    def _search(self, weights: LatentWeights, sparsity: float, look: bool) -> Tensor:
        """The least bias within the budget, or the strongest; 0-dimensional.

        From the present one outwards until the answer is passed, then halving. Where the host may
        not look, the number of trials is fixed: an answer that is far away takes some more steps.
        """
        here = (self._gammas[0] / UNIT).round().long()
        low, high, reach = torch.full_like(here, -1), torch.full_like(here, STRONGEST + 1), 1
        for _ in range(2 * STRONGEST if look else TRIALS):
            over = self._is_over(self._cost(weights, self._kept(here * UNIT, weights, sparsity)))
            low, high = torch.where(over, here, low), torch.where(over, high, here)
            if look and high - low <= 1:
                break
            outward = torch.where(over, here + reach, here - reach).clamp(0, STRONGEST)
            passed = (low >= 0) & (high <= STRONGEST)
            here = torch.where(passed, (low + high + 1) // 2, outward)
            reach *= 4
        return torch.where(high <= STRONGEST, high, here) * UNIT

    def _kept(self, gamma: Tensor, weights: LatentWeights, sparsity: float) -> Tensor:
        """The share of each tensor that is kept at a sparsity with a bias, float64."""
        share = torch.full((), sparsity, dtype=torch.float64, device=weights.device)
        pruned = weights.counts_pruned(self.cuts_with(gamma.double(), weights, share))
        return 1 - pruned.double() / weights.sizes.clamp_min(1)

    def _cost(self, weights: LatentWeights, kept: Tensor) -> Tensor:
        """What is kept of all tensors costs so much, 0-dimensional float64."""

        def make(_: LatentWeights) -> Tensor:
            return torch.tensor(self._sizes, dtype=torch.float64, device=weights.device)

        return (kept * weights.constant(("sizes", *self._sizes), make) * self.costs).sum()

    def _is_over(self, cost: Tensor) -> Tensor:
        return cost > self._budget * (1 + 1e-9)  # which is rounding
