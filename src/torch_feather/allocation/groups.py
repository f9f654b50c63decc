"""A separate target for each group of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..context import MethodContext
from ..errors import ConfigurationError
from ..selection import Cutoff
from ..weights.latent import LatentWeights
from ..weights.segments import Segment, first_with_cutoff, position_of
from .base import NO_STATE, Allocation, FittedAllocation, State


@dataclass(frozen=True)
class Group:
    """Weight tensors with a separate target.

    Attributes:
        sparsity: final fraction of zeros among them.
        names: names of the weight tensors.

    Example:
        >>> Group(0.9, ("0.weight", "1.weight")).sparsity
        0.9
    """

    sparsity: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class Grouped(Allocation):
    """Applies another allocation within each group and prunes round(s n) of its n weights.

    All groups follow one schedule. `sparsify` makes it if `sparsity` is a mapping.

    Attributes:
        within: the allocation; it treats a group as if it were the network.
        groups: each prunable weight is in one of them.

    Example:
        >>> from torch import nn
        >>> from torch_feather import sparsify
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> targets = {"0.*": 0.25, "*": 0.6}
        >>> sparsifier = sparsify(
        ...     model, optimizer, sparsity=targets, total_steps=1, schedule="constant"
        ... )
        >>> {name: int((~mask).sum()) for name, mask in sparsifier.masks().items()}
        {'0.weight': 5, '1.weight': 6}
    """

    within: Allocation
    groups: tuple[Group, ...]

    def fit(self, context: MethodContext) -> FittedGroups:
        if getattr(self.within, "budget", None) is not None:
            raise ConfigurationError(
                "A budget for the whole network contradicts targets per group. Give the bias gamma "
                "instead of the budget, or one sparsity."
            )
        parts = []
        for group in self.groups:
            members = tuple(context.names.index(name) for name in group.names)
            inner = _inner(context, members, group)
            try:
                parts.append(_Part(group, members, self.within.fit(inner)))
            except ConfigurationError as error:
                names = ", ".join(group.names[:2]) + (", ..." if len(group.names) > 2 else "")
                raise ConfigurationError(f"In the group of {names}: {error}") from None
        return FittedGroups(parts, context)


class _Part(NamedTuple):
    """A group on one model: its tensors, and the allocation within it."""

    group: Group
    members: tuple[int, ...]
    within: FittedAllocation


def _inner(context: MethodContext, members: tuple[int, ...], group: Group) -> MethodContext:
    """Return the context of a group as if it were the network."""
    weights = context.weights.subset(members)
    return replace(context, names=group.names, weights=weights, sparsity=group.sparsity)


class FittedGroups(FittedAllocation):
    """A `Grouped` for one model.

    Args:
        parts: the groups, and the allocation within each.
        context: the context of the whole network.

    Example:
        >>> from torch import nn
        >>> from torch_feather.allocation import Global
        >>> model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
        >>> weights = LatentWeights([model[0].weight, model[1].weight])
        >>> context = MethodContext(model, ["0.weight", "1.weight"], weights, 11 / 30, 100)
        >>> groups = Group(0.25, ("0.weight",)), Group(0.6, ("1.weight",))
        >>> Grouped(Global(), groups).fit(context).on_shards
        True
    """

    def __init__(self, parts: Sequence[_Part], context: MethodContext):
        self._parts, self._target = parts, context.sparsity

    @property
    def on_shards(self) -> bool:  # type: ignore[override]
        return all(part.within.on_shards for part in self._parts)

    def initial_state(self, context: MethodContext) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for group, members, within in self._parts:
            for key, value in within.initial_state(_inner(context, members, group)).items():
                whole = state.setdefault(key, value.new_zeros(len(context.names)))
                whole[list(members)] = value
        return state

    def cutoffs(
        self, weights: LatentWeights, sparsity: Tensor, state: State = NO_STATE
    ) -> list[Segment]:
        # Each group goes from its zeros at the start of training to its target. All have completed
        # the same fraction of the way.
        first = state["zeros"].sum().double() / weights.size
        difference = self._target - first
        fraction = torch.where(difference == 0, 1.0, (sparsity - first) / difference)
        segments: list[Segment] = []
        for group, members, within in self._parts:
            inner = weights.subset(members)
            own = {key: _select(weights, entry, members) for key, entry in state.items()}
            begin = own["zeros"].sum().double() / inner.size
            target = group.sparsity * fraction + begin * (1 - fraction)
            found = within.cutoffs(inner, target, own)
            segments += _in_whole(found, inner, weights, members)
        return sorted(segments, key=lambda segment: segment.start)


def _select(weights: LatentWeights, entry: Tensor, members: Sequence[int]) -> Tensor:
    """Return the entries of the state that belong to some of the weight tensors."""
    index = weights.constant(
        ("members", *members), lambda _: torch.tensor(list(members), device=weights.device)
    )
    return entry.index_select(0, index)


def _in_whole(
    segments: Sequence[Segment],
    inner: LatentWeights,
    weights: LatentWeights,
    members: Sequence[int],
) -> list[Segment]:
    """Return segments of a subset as segments of all weights, one per tensor.

    Segments that shared a cutoff still share one. A cutoff's `last` is an index among the local
    weights. The subset keeps the order of the tensors, so `last` shifts with its tensor.
    """

    def offsets(_: LatentWeights) -> tuple[Tensor, Tensor]:
        pairs = [
            (inner.local_spans[j][0], weights.local_spans[i][0]) for j, i in enumerate(members)
        ]
        first, moved = torch.tensor(sorted(pairs), device=weights.device).unbind(1)
        return first.contiguous(), moved - first

    first, shift = inner.constant("offsets", offsets)
    cutoffs: list[Cutoff] = []
    for j, same in enumerate(first_with_cutoff(segments)):
        cutoff = segments[j].cutoff
        at = torch.bucketize(cutoff.last, first, right=True).sub(1).clamp(min=0)
        moved = cutoffs[same] if same < j else cutoff._replace(last=cutoff.last + shift.take(at))
        cutoffs.append(moved)
    positions = [position_of(inner, segments, j) for j in range(len(members))]
    return [
        Segment(*weights.spans[i], cutoffs[position], segments[position].scale)
        for i, position in zip(members, positions, strict=True)
    ]
