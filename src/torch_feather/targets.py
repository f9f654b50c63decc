"""The target of a run: one fraction of zeros, or one per group of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from fractions import Fraction
from numbers import Real
from typing import Any

from torch import nn

from .allocation.groups import Group, Grouped
from .errors import ConfigurationError
from .methods.base import AnyMethod
from .patterns import Pattern
from .prunable import Filter, Prunable, group_prunable, unwrap

COUNTS = ("prunable", "all")

Sparsity = float | Mapping[Filter, float]
"""One target, or one per group of weights: a mapping from filters to targets."""


def check_fraction(sparsity: Any, name: str = "sparsity") -> float:
    """Return a fraction of zeros as a float.

    Args:
        sparsity: a number in [0, 1).
        name: name of the argument, for the message.

    Raises:
        ConfigurationError: `sparsity` is not a number in [0, 1).

    Example:
        >>> check_fraction(0.9)
        0.9
    """
    if not isinstance(sparsity, Real) or not 0.0 <= float(sparsity) < 1.0:
        raise ConfigurationError(
            f"{name} must be a fraction of zeros in [0, 1), for example 0.95; got {sparsity!r}."
        )
    return float(sparsity)


@dataclass(frozen=True)
class Target:
    """Final fractions of zeros.

    Attributes:
        sparsity: fraction of all prunable weights.
        requested: the same before counts are rounded. Options of methods depend on it.
        sizes: number of weights of each group; of all weights if there are no groups.
        groups: weights with separate targets; none if there is one target.

    Example:
        >>> from torch_feather.prunable import find_prunable
        >>> model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 5))
        >>> sparsity = {"1.*": 0.5, "*": 0.9}
        >>> Target.of(model, find_prunable(model), sparsity, "prunable").sizes
        (50, 100)
    """

    sparsity: float
    requested: float
    sizes: tuple[int, ...]
    groups: tuple[Group, ...] = ()

    @classmethod
    def of(
        cls, model: nn.Module, prunable: Sequence[Prunable], sparsity: Sparsity, count: str
    ) -> Target:
        """Return the target of a call of `sparsify`.

        Args:
            model: the model.
            prunable: its prunable weights.
            sparsity: a checked fraction, or a mapping from filters to fractions.
            count: reference of one fraction: 'prunable' weights, or 'all' parameters.

        Raises:
            ConfigurationError: the target is impossible.
        """
        if count not in COUNTS:
            raise ConfigurationError(f"count must be 'prunable' or 'all', got {count!r}.")
        size = sum(item.parameter.numel() for item in prunable)
        if isinstance(sparsity, Mapping):
            if count == "all":
                raise ConfigurationError(
                    "count='all' belongs to one sparsity. Targets of groups refer to the prunable "
                    "weights of each group. Leave out count."
                )
            groups = _groups(model, prunable, sparsity)
            sizes = {item.name: item.parameter.numel() for item in prunable}
            members = tuple(sum(sizes[name] for name in group.names) for group in groups)
            zeros = sum(round(g.sparsity * n) for g, n in zip(groups, members, strict=True))
            # Exact fractions: equal targets for all groups give the same total, to the last bit.
            total = sum(Fraction(g.sparsity) * n for g, n in zip(groups, members, strict=True))
            rounded, requested = (zeros / size, float(total / size)) if size else (0.0, 0.0)
            return cls(rounded, requested, members, groups)
        requested = sparsity
        if count == "all" and size:
            requested = float(Fraction(sparsity) * _parameters(unwrap(model)) / size)
            sparsity = _of_prunable(sparsity, size, unwrap(model))
        return cls(sparsity, requested, (size,))

    def given_to(self, method: AnyMethod) -> tuple[AnyMethod, float]:
        """Return the method with the targets of the groups, and the target of all prunable weights.

        The pattern of a method determines which targets can be met exactly.

        Args:
            method: the description of a method.

        Raises:
            ConfigurationError: the method does not support groups, or its pattern has another
                sparsity.
        """
        target, pattern = self.sparsity, getattr(method, "pattern", None)
        if isinstance(pattern, Pattern) and any(self.sizes):
            fractions = [group.sparsity for group in self.groups] or [self.sparsity]
            zeros = sum(pattern.zeros(s, n) for s, n in zip(fractions, self.sizes, strict=True))
            target = zeros / sum(self.sizes)
        if not self.groups:
            return method, target
        if not is_dataclass(method) or not hasattr(method, "allocation"):
            raise ConfigurationError(
                f"{type(method).__name__} has no allocation, so it takes one number as sparsity. "
                "Methods with an allocation (feather, gmp, st3, spartan, ...) take a target for "
                "each group."
            )
        allocation = Grouped(method.allocation, self.groups)
        return replace(method, allocation=allocation), target


def _groups(
    model: nn.Module, prunable: Sequence[Prunable], sparsity: Mapping[Filter, float]
) -> tuple[Group, ...]:
    """Return the prunable weights in groups, one per entry of a mapping from filters to targets."""
    if not sparsity:
        raise ConfigurationError("sparsity is an empty mapping. Give every weight a target.")
    for one in sparsity:
        if not isinstance(one, str | re.Pattern | type) and not callable(one):
            raise ConfigurationError(
                "sparsity: a key must be a glob, a compiled regex, a module type or a callable "
                f"(module, name) -> bool; got {one!r:.80}."
            )
    fractions = [
        check_fraction(fraction, f"sparsity[{one!r}]") for one, fraction in sparsity.items()
    ]
    numbers = group_prunable(model, prunable, sparsity)
    return tuple(
        Group(fraction, tuple(p.name for p, n in zip(prunable, numbers, strict=True) if n == g))
        for g, fraction in enumerate(fractions)
    )


def _of_prunable(sparsity: float, size: int, model: nn.Module) -> float:
    """Return the fraction of `size` prunable weights that is `sparsity` of all parameters."""
    total = _parameters(model)
    zeros = round(sparsity * total)
    if zeros >= size:
        raise ConfigurationError(
            f"sparsity={sparsity} of all {total:,} parameters is {zeros:,} zeros, but only "
            f"{size:,} of them are prunable. The highest possible sparsity of all parameters is "
            f"{(size - 1) / total:.6g}. Lower it, prune more weights (include=), or count prunable "
            "weights alone (count='prunable')."
        )
    return zeros / size


def _parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())
