"""What a user asks for, as shares of the prunable weights: one, or one for each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from fractions import Fraction
from numbers import Real
from typing import Any

from torch import nn

from .allocation.groups import Group, Grouped
from .errors import ConfigurationError
from .methods import AnyMethod
from .patterns import Pattern
from .prunable import Filter, Prunable, group_prunable, unwrap

COUNTS = ("prunable", "all")

Sparsity = float | Mapping[Filter, float]


def check_share(sparsity: Any, where: str = "sparsity") -> float:
    """The share as a float; raises ConfigurationError where it is none."""
    if not isinstance(sparsity, Real) or not 0.0 <= float(sparsity) < 1.0:
        raise ConfigurationError(
            f"{where} is a share of zeros in [0, 1), for example 0.95; got {sparsity!r}."
        )
    return float(sparsity)


@dataclass(frozen=True)
class Target:
    """Final shares of zeros.

    Attributes:
        sparsity: over all prunable weights.
        asked: the same before numbers of zeros are rounded: what options depend on.
        sizes: numbers of weights, of each group; of all where there are no groups.
        groups: weights with shares of their own; none where all share one.
    """

    sparsity: float
    asked: float
    sizes: tuple[int, ...]
    groups: tuple[Group, ...] = ()

    @classmethod
    def of(
        cls, model: nn.Module, prunable: Sequence[Prunable], sparsity: Sparsity, count: str
    ) -> Target:
        """The target that `sparsify` was asked for; raises ConfigurationError."""
        if count not in COUNTS:
            raise ConfigurationError(f"count is 'prunable' or 'all', got {count!r}.")
        size = sum(item.parameter.numel() for item in prunable)
        if isinstance(sparsity, Mapping):
            if count == "all":
                raise ConfigurationError(
                    "count='all' belongs to one sparsity; shares of groups are counted over the "
                    "prunable weights of each group."
                )
            groups = _groups(model, prunable, sparsity)
            sizes = {item.name: item.parameter.numel() for item in prunable}
            members = tuple(sum(sizes[name] for name in group.names) for group in groups)
            zeros = sum(round(g.sparsity * n) for g, n in zip(groups, members, strict=True))
            # As fractions: one share for all groups is that share, to the last bit.
            wanted = sum(Fraction(g.sparsity) * n for g, n in zip(groups, members, strict=True))
            rounded, asked = (zeros / size, float(wanted / size)) if size else (0.0, 0.0)
            return cls(rounded, asked, members, groups)
        asked = sparsity
        if count == "all" and size:
            asked = float(Fraction(sparsity) * _parameters(unwrap(model)) / size)
            sparsity = _of_prunable(sparsity, size, unwrap(model))
        return cls(sparsity, asked, (size,))

    def given_to(self, method: AnyMethod) -> tuple[AnyMethod, float]:
        """The method with the shares of the groups, and the share of all prunable weights.

        A method's pattern says what can be reached exactly.

        Raises:
            ConfigurationError: the method, or its pattern, has targets of its own.
        """
        target, pattern = self.sparsity, getattr(method, "pattern", None)
        if isinstance(pattern, Pattern) and any(self.sizes):
            shares = [group.sparsity for group in self.groups] or [self.sparsity]
            zeros = sum(pattern.zeros(s, n) for s, n in zip(shares, self.sizes, strict=True))
            target = zeros / sum(self.sizes)
        if not self.groups:
            return method, target
        if not is_dataclass(method) or not hasattr(method, "allocation"):
            raise ConfigurationError(
                f"{type(method).__name__} learns how to share a target among the layers, so it "
                "takes one number as sparsity. Methods with an allocation (feather, gmp, st3, "
                "spartan, ...) take a share for each group."
            )
        allocation = Grouped(method.allocation, self.groups)
        return replace(method, allocation=allocation), target


def _groups(
    model: nn.Module, prunable: Sequence[Prunable], sparsity: Mapping[Filter, float]
) -> tuple[Group, ...]:
    """The groups that a mapping from filters to shares makes of the prunable weights."""
    if not sparsity:
        raise ConfigurationError("sparsity is an empty mapping; give a share to every weight.")
    shares = [check_share(share, f"sparsity[{one!r}]") for one, share in sparsity.items()]
    numbers = group_prunable(model, prunable, sparsity)
    return tuple(
        Group(share, tuple(p.name for p, n in zip(prunable, numbers, strict=True) if n == g))
        for g, share in enumerate(shares)
    )


def _of_prunable(sparsity: float, size: int, model: nn.Module) -> float:
    """The share of `size` prunable weights that is a share `sparsity` of all parameters."""
    every = _parameters(model)
    zeros = round(sparsity * every)
    if zeros >= size:
        raise ConfigurationError(
            f"sparsity={sparsity} of all {every:,} parameters is {zeros:,} zeros, but only "
            f"{size:,} of them are prunable: the highest share of all that leaves one of these is "
            f"{(size - 1) / every:.6g}. Lower it, prune more of them (include=), or count over "
            "prunable weights alone (count='prunable')."
        )
    return zeros / size


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
