"""The modules that lead from a model to its parameters."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Path(NamedTuple):
    """How modules lead from a model to its parameters with given names.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> path = find_path(model, ["0.weight"])
        >>> path.holds(model, list(model.parameters()))
        True
        >>> model[0] = nn.Linear(2, 1, bias=False)
        >>> path.holds(model, list(model.parameters()))
        False
    """

    root: nn.Module
    links: list[tuple[nn.Module, str, nn.Module]]
    """Modules, and the child that each of them has by a name."""
    ends: list[tuple[nn.Module, str]]
    """The module that holds each parameter, and the name there."""

    def holds(self, root: nn.Module, parameters: Sequence[Tensor]) -> bool:
        """Return whether the modules still lead to these parameters."""
        if root is not self.root:
            return False
        for module, name, child in self.links:
            if module._modules.get(name) is not child:
                return False
        found = [module._parameters.get(name) for module, name in self.ends]
        return all(map(operator.is_, found, parameters))


def find_path(root: nn.Module, names: Sequence[str]) -> Path | None:
    """Return the path to parameters with these names; None if there is none.

    Args:
        root: the model, without wrappers.
        names: dotted names, without those of wrappers of `torch.compile`.

    Example:
        >>> find_path(nn.Linear(2, 1), ["other.weight"]) is None
        True
    """
    links: dict[tuple[nn.Module, str], nn.Module] = {}
    ends = []
    for name in names:
        module = root
        *parts, attribute = name.split(".")
        for part in parts:
            for step in (part, "_orig_mod"):
                child = module._modules.get(step)
                if child is None and step == part:
                    return None
                if child is not None:
                    links[module, step] = child
                    module = child
        ends.append((module, attribute))
    return Path(root, [(*link, child) for link, child in links.items()], ends)
