"""A target of its own for each group of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..methods.base import Setting
from ..selection import Cut
from ..weights.latent import LatentWeights, Segment, first_of_cut
from .base import Allocation, Fitted


@dataclass(frozen=True)
class Group:
    """Weight tensors, by name, with a target of their own."""

    sparsity: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class Grouped(Allocation):
    """Within each group another allocation finds the cuts; round(s n) of its n weights are pruned.

    All groups follow one schedule. Made by `sparsify` where `sparsity` is a mapping.

    Attributes:
        within: the allocation; it sees a group as if that were the network.
        groups: each prunable weight is in one of them.
    """

    within: Allocation
    groups: tuple[Group, ...]

    def fit(self, setting: Setting) -> FittedGroups:
        """See `Allocation`."""
        if getattr(self.within, "budget", None) is not None:
            raise ConfigurationError(
                "A budget for the whole network and targets per group contradict each other: give "
                "the bias gamma instead of the budget, or one sparsity."
            )
        parts = []
        for group in self.groups:
            members = tuple(setting.names.index(name) for name in group.names)
            inner = replace(
                setting,
                names=group.names,
                weights=setting.weights.part(members),
                sparsity=group.sparsity,
            )
            try:
                parts.append(_Part(members, group.sparsity, self.within.fit(inner)))
            except ConfigurationError as error:
                names = ", ".join(group.names[:2]) + (", ..." if len(group.names) > 2 else "")
                raise ConfigurationError(f"In the group of {names}: {error}") from None
        return FittedGroups(parts, setting)


class _Part(NamedTuple):
    """A group at work: which tensors, its target, and the cuts within it."""

    members: tuple[int, ...]
    sparsity: float
    within: Fitted


class FittedGroups(Fitted):
    """A `Grouped` that knows its model."""

    def __init__(self, parts: Sequence[_Part], setting: Setting):
        self._parts, self._target = parts, setting.sparsity
        self._state: dict[str, Tensor | list[Tensor]] = {}
        for part in parts:
            for key, value in part.within.state.items():
                assert isinstance(value, Tensor)
                whole = self._state.setdefault(key, value.new_zeros(len(setting.names)))
                assert isinstance(whole, Tensor)
                whole[list(part.members)] = value

    @property
    def on_shards(self) -> bool:  # type: ignore[override]
        """See `Allocation`."""
        return all(part.within.on_shards for part in self._parts)

    @property
    def state(self) -> dict[str, Tensor | list[Tensor]]:
        """See `Fitted`; the entries of all groups in one.

        Each group goes from the zeros that it has to those that it is to have: of these read are
        the `zeros` that `Scheduled` adds.
        """
        return self._state

    def cuts(self, weights: LatentWeights, sparsity: Tensor) -> list[Segment]:
        """See `Fitted`."""
        zeros = self._of(weights, "zeros", range(len(weights.views)))
        first = zeros.sum().double() / weights.size
        way = self._target - first
        share = torch.where(way == 0, 1.0, (sparsity - first) / way)
        segments: list[Segment] = []
        for members, target, within in self._parts:
            inner = weights.part(members)
            begin = self._of(weights, "zeros", members).sum().double() / inner.size
            for key in within.state:
                within.state[key] = self._of(weights, key, members)
            cuts = within.cuts(inner, target * share + begin * (1 - share))
            segments += _placed(cuts, inner, weights, members)
        return sorted(segments, key=lambda segment: segment.start)

    def _of(self, weights: LatentWeights, key: str, members: Sequence[int]) -> Tensor:
        """The entries of the state that belong to some of the weight tensors."""
        entry = self._state[key]
        assert isinstance(entry, Tensor)
        where = weights.constant(
            ("members", *members), lambda _: torch.tensor(list(members), device=weights.device)
        )
        return entry.index_select(0, where)


def _placed(
    segments: Sequence[Segment],
    inner: LatentWeights,
    weights: LatentWeights,
    members: Sequence[int],
) -> list[Segment]:
    """Segments of a part as those of the whole, one for each tensor; what shared a cut still does.

    The part keeps the order of the whole, so `last`, an index among the weights that are here,
    moves with the tensor that it lies in.
    """

    def offsets(_: LatentWeights) -> tuple[Tensor, Tensor]:
        places = sorted((inner.places[j][0], weights.places[i][0]) for j, i in enumerate(members))
        first, there = torch.tensor(places, device=weights.device).unbind(1)
        return first.contiguous(), there - first

    first, shift = inner.constant("offsets", offsets)
    moved: list[Cut] = []
    for j, same in enumerate(first_of_cut(segments)):
        cut = segments[j].cut
        at = torch.bucketize(cut.last, first, right=True).sub(1).clamp(min=0)
        moved.append(moved[same] if same < j else cut._replace(last=cut.last + shift.take(at)))
    places = [inner.place_of(j, segments) for j in range(len(members))]
    return [
        Segment(*weights.spans[i], moved[place], segments[place].scale)
        for i, place in zip(members, places, strict=True)
    ]
