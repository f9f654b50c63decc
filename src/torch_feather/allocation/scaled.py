"""One ranking for the whole network in which each layer's magnitudes are scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import devices
from ..context import MethodContext
from ..errors import ConfigurationError, nearest
from ..measure.flops import count_flops
from ..prunable import unwrap
from ..scalars import count_of
from ..weights.latent import LatentWeights
from ..weights.passes import count_pruned
from ..weights.segments import Segment
from ..weights.selecting import select_weights
from .base import NO_STATE, Allocation, FittedAllocation, State

# A bias that follows a budget is a multiple of 1 / 256, so it often stays the same for many steps.
UNIT = 2.0**-8
# The largest such bias, in units.
STRONGEST = 32 * 256
# Biases tried after a step if reading the result would synchronize the host.
TRIALS = 8
# Largest exponent of a scale: float32 holds its product with any weight.
LARGEST = 50.0


def scaled_cutoffs(weights: LatentWeights, scale: Tensor, sparsity: Tensor) -> list[Segment]:
    """Return cutoffs that prune the smallest |w| times the scale of its layer; exact in total.

    Args:
        weights, sparsity: as for `FittedAllocation.cutoffs`.
        scale: positive, one per weight tensor.

    Example:
        >>> weights = LatentWeights([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
        >>> scale = torch.tensor([4.0, 1.0])  # scores: 4, 8 and 3, 4
        >>> segments = scaled_cutoffs(weights, scale, torch.tensor(0.5).double())
        >>> count_pruned(weights, segments).tolist()
        [1, 1]
    """
    scales = list(scale.to(weights.wide))
    k = count_of(sparsity, weights.size)
    cutoff = select_weights(weights, k, scales)
    pairs = zip(weights.spans, scales, strict=True)
    return [Segment(start, stop, cutoff, scale) for (start, stop), scale in pairs]


@dataclass(frozen=True)
class Sigma(FittedAllocation):
    """Ranks |w| sqrt(sum of the dimensions of its tensor), so that large layers keep more.

    Source: ST-3 (Vanderschueren and De Vleeschouwer, WACV 2023), variant sigma.

    Example:
        >>> weights = LatentWeights([torch.ones(1, 3), torch.ones(8, 8)])
        >>> segments = Sigma().cutoffs(weights, torch.tensor(0.5).double())
        >>> count_pruned(weights, segments).tolist()  # 34 of 67; small layers first
        [3, 31]
    """

    on_shards = True

    def cutoffs(
        self, weights: LatentWeights, sparsity: Tensor, state: State = NO_STATE
    ) -> list[Segment]:
        return scaled_cutoffs(weights, weights.constant(self, self._scale), sparsity)

    def _scale(self, weights: LatentWeights) -> Tensor:
        sums = [sum(shape) for shape in weights.shapes]
        return torch.tensor(sums, dtype=torch.float64, device=weights.device).sqrt()


@dataclass(frozen=True)
class FlopsBiased(Allocation):
    """Ranks |w| / c^gamma, with c the cost of a weight of its layer: multiply-adds, or time.

    Layers at high resolution, mostly early ones, lose more. gamma = 0 is `Global`.

    Source: the Feather supplement, section 6, says only that the global backbone was biased towards
    pruning earlier layers. This formula is an addition of this package.

    Attributes:
        gamma: the bias, >= 0. None: after every step the smallest one, in units of 1 / 256, for
            which the present weights would cost at most `budget` at the final sparsity.
        budget: maximum cost of the prunable weights at the final sparsity, in the unit of the
            costs: multiply-adds per sample with `example_input`.
        costs: cost of a weight, by weight name, such as `runtime.layer_milliseconds` returns.
        example_input: or an input to count multiply-adds with, as for `count_flops`.

    Raises:
        ConfigurationError: not exactly one of gamma and budget, or of costs and example_input.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> weights = LatentWeights([torch.ones(4, 4), torch.ones(4, 4)])
        >>> context = MethodContext(model, ["0.weight", "1.weight"], weights, 0.5, 100)
        >>> fitted = FlopsBiased(gamma=1.0, costs={"0.weight": 1.0, "1.weight": 2.0}).fit(context)
        >>> half, state = torch.tensor(0.5).double(), fitted.initial_state(context)
        >>> count_pruned(weights, fitted.cutoffs(weights, half, state)).tolist()
        [0, 16]
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
                "Give the cost of a weight once: example_input=, an input of the network to count "
                "multiply-adds with, or costs={name: cost of each weight}."
            )
        if self.costs is not None and not isinstance(self.costs, Mapping):
            raise ConfigurationError(f"costs must map weight names to numbers, got {self.costs!r}.")
        if self.gamma is not None and not 0 <= self.gamma < math.inf:
            raise ConfigurationError(f"gamma must be a number >= 0, got {self.gamma!r}.")

    def fit(self, context: MethodContext) -> FittedBias:
        costs = self._costs(context)
        if self.gamma is not None:
            return FittedBias(costs, self.gamma)
        assert self.budget is not None
        model = unwrap(context.model)
        # Not from `context.weights`: with a pattern, those are units of several weights.
        sizes = [model.get_parameter(name).numel() for name in context.names]
        return FittedBudget(costs, sizes, self.budget)

    def _costs(self, context: MethodContext) -> list[float]:
        """Return the cost of a weight of each tensor; raise ConfigurationError unless it is > 0."""
        costs = self._counted(context) if self.costs is None else self.costs
        for name in context.names:
            if not costs.get(name, 0) > 0:
                known = f"costs has no cost above 0 for {name}{nearest(name, costs)}"
                unused = f"{name} makes no multiply-add for this example_input."
                raise ConfigurationError(
                    f"{known if self.costs is not None else unused} Every prunable weight needs "
                    f"a cost above 0. Give one, or exclude the weight: exclude={name!r}."
                )
        return [float(costs[name]) for name in context.names]

    def _counted(self, context: MethodContext) -> dict[str, float]:
        """Return multiply-adds per weight, by name; a tied weight has the sum over its uses."""
        model = unwrap(context.model)
        names = {id(model.get_parameter(name)): name for name in context.names}
        costs: dict[str, float] = {}
        for layer in count_flops(model, self.example_input).layers:
            name = names.get(id(model.get_parameter(layer.name)))
            if name is not None:
                per_weight = layer.dense / math.prod(layer.weight_shape)
                costs[name] = costs.get(name, 0.0) + per_weight
        return costs


class FittedBias(FittedAllocation):
    """A `FlopsBiased` with known costs and bias.

    State: `costs`, of a weight of each tensor. They are saved because another measurement or
    example input after a restart would give other costs.

    Args:
        costs: of a weight of each tensor.
        gamma: the bias.

    Example:
        >>> weights = LatentWeights([torch.ones(4), torch.ones(4)])
        >>> state = {"costs": torch.tensor([2.0, 1.0])}
        >>> fitted = FittedBias([2.0, 1.0], gamma=1.0)
        >>> segments = fitted.cutoffs(weights, torch.tensor(0.5).double(), state)
        >>> count_pruned(weights, segments).tolist()
        [4, 0]
    """

    on_shards = True

    def __init__(self, costs: Sequence[float], gamma: float = 0.0):
        self._costs, self._gamma = costs, gamma

    def initial_state(self, context: MethodContext) -> dict[str, Tensor]:
        costs = torch.tensor(self._costs, dtype=torch.float64)
        return {"costs": costs.to(context.weights.device, context.weights.wide)}

    def cutoffs(
        self, weights: LatentWeights, sparsity: Tensor, state: State = NO_STATE
    ) -> list[Segment]:
        return biased_cutoffs(weights, sparsity, state["costs"], self._gamma)


def biased_cutoffs(
    weights: LatentWeights, sparsity: Tensor, costs: Tensor, gamma: float | Tensor
) -> list[Segment]:
    """Return the cutoffs of a ranking by |w| / costs^gamma.

    Args:
        weights, sparsity: as for `FittedAllocation.cutoffs`.
        costs: of a weight of each tensor.
        gamma: the bias, a number or one per tensor.

    Example:
        >>> weights = LatentWeights([torch.ones(4), torch.ones(4)])
        >>> half, costs = torch.tensor(0.5).double(), torch.tensor([1.0, 2.0])
        >>> count_pruned(weights, biased_cutoffs(weights, half, costs, 1.0)).tolist()
        [0, 4]
    """
    logs = costs.double().log()
    exponents = -gamma * (logs - logs.mean())
    # A larger bias would only prune entire layers in the order of their costs.
    exponents *= (LARGEST / exponents.abs().amax()).clamp(max=1.0)
    return scaled_cutoffs(weights, exponents.exp(), sparsity)


class FittedBudget(FittedBias):
    """A `FlopsBiased` with a bias that follows the weights, so that kept weights meet a budget.

    A larger bias exchanges expensive weights for cheaper ones, never the reverse. So the cost
    falls as the bias grows, and the smallest bias that meets the budget can be searched.

    State: also `gamma`, the same for all tensors.

    Args:
        costs: of a weight of each tensor.
        sizes: number of weights of each tensor.
        budget: maximum cost of the kept weights.

    Example:
        >>> weights = LatentWeights([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])])
        >>> fitted = FittedBudget(costs=[2.0, 1.0], sizes=[2, 2], budget=3.0)
        >>> state = {"costs": torch.tensor([2.0, 1.0]), "gamma": torch.zeros(2)}
        >>> # The smallest bias that keeps 4.0 and 2.0 (cost 3) instead of 3.0 and 4.0 (cost 4):
        >>> float(fitted.next_state(weights, 0.5, state)["gamma"][0])
        0.5859375
    """

    follows = True

    def __init__(self, costs: Sequence[float], sizes: Sequence[int], budget: float):
        super().__init__(costs)
        self._sizes, self._budget = tuple(sizes), budget

    def initial_state(self, context: MethodContext) -> dict[str, Tensor]:
        weights, sparsity = context.weights, context.sparsity
        state = super().initial_state(context)
        state["gamma"] = weights.sizes.to(weights.wide).zero_()
        state["gamma"].copy_(self._search(weights, sparsity, state, read=True))
        kept = self._density(state["gamma"][0], weights, sparsity, state)
        if violation := self.violation(weights, kept, state):
            raise ConfigurationError(
                f"No bias keeps the network within the budget at sparsity={sparsity}: with the "
                f"strongest {violation} Raise the budget or the sparsity."
            )
        return state

    def cutoffs(
        self, weights: LatentWeights, sparsity: Tensor, state: State = NO_STATE
    ) -> list[Segment]:
        return biased_cutoffs(weights, sparsity, state["costs"], state["gamma"].double())

    def next_state(
        self, weights: LatentWeights, sparsity: float, state: State
    ) -> dict[str, Tensor]:
        read = not devices.synchronizes(weights.device)
        gamma = self._search(weights, sparsity, state, read)
        return {"gamma": gamma.to(weights.wide).expand_as(state["gamma"])}

    def violation(self, weights: LatentWeights, kept: Tensor, state: State) -> str | None:
        cost = self._cost(weights, kept, state)
        if not bool(self._exceeds(cost)):
            return None
        return f"its weights cost {float(cost):,.6g}, more than the budget of {self._budget:,.6g}."

    def _search(self, weights: LatentWeights, sparsity: float, state: State, read: bool) -> Tensor:
        """Return the smallest bias within the budget, or the strongest; 0-dimensional.

        The search goes outwards from the present bias until it passes the answer, then bisects. If
        the host may not read, the number of trials is fixed; a distant answer takes several steps.
        """
        trial = (state["gamma"][0] / UNIT).round().long()
        low, high, reach = torch.full_like(trial, -1), torch.full_like(trial, STRONGEST + 1), 1
        for _ in range(2 * STRONGEST if read else TRIALS):
            kept = self._density(trial * UNIT, weights, sparsity, state)
            over = self._exceeds(self._cost(weights, kept, state))
            low, high = torch.where(over, trial, low), torch.where(over, high, trial)
            if read and high - low <= 1:
                break
            outward = torch.where(over, trial + reach, trial - reach).clamp(0, STRONGEST)
            passed = (low >= 0) & (high <= STRONGEST)
            trial = torch.where(passed, (low + high + 1) // 2, outward)
            reach *= 4
        return torch.where(high <= STRONGEST, high, trial) * UNIT

    def _density(
        self, gamma: Tensor, weights: LatentWeights, sparsity: float, state: State
    ) -> Tensor:
        """Return the density of each tensor at a sparsity with a bias, float64."""
        target = torch.full((), sparsity, dtype=torch.float64, device=weights.device)
        found = biased_cutoffs(weights, target, state["costs"], gamma.double())
        return 1 - count_pruned(weights, found).double() / weights.sizes.clamp_min(1)

    def _cost(self, weights: LatentWeights, kept: Tensor, state: State) -> Tensor:
        """Return the cost of the kept weights of all tensors, 0-dimensional float64."""

        def make(_: LatentWeights) -> Tensor:
            return torch.tensor(self._sizes, dtype=torch.float64, device=weights.device)

        sizes = weights.constant(("sizes", *self._sizes), make)
        return (kept * sizes * state["costs"].double()).sum()

    def _exceeds(self, cost: Tensor) -> Tensor:
        return cost > self._budget * (1 + 1e-9)  # 1e-9: rounding
