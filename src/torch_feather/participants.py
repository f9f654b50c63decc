"""Which weights of a model took part in sparse training, remembered as long as the model lives.

The memory is outside of the model, whose modules and keys stay as they are. So a copy of the model,
or a model that was loaded from a plain state dict, has none. Sparse files and run directories
store the names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .prunable import Filters, Prunable, find_prunable, unwrap

# By module: the attributes of its weights that took part.
_attributes: WeakIdKeyDictionary = WeakIdKeyDictionary()
# Models of which a warning told that other weights took no part.
_told: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remember(model: nn.Module, prunable: Iterable[Prunable]) -> None:
    """Remember which weights of a model take part in sparse training, and forget all others.

    Args:
        model: the model.
        prunable: these weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> remember(model, find_prunable(model, "1.*"))
        >>> participants(model)
        ['1.weight', '1.bias']
    """
    forget(model)
    for item in prunable:
        _attributes[item.module] = (*_attributes.get(item.module, ()), item.attribute)


def remember_names(model: nn.Module, names: Collection[str] | None) -> None:
    """Remember which weights take part, by name, such as those that a file stores.

    Args:
        model: the model.
        names: names of its weights. Unknown names are ignored. None if they are not known.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> remember_names(model, ["1.weight"])
        >>> participants(model)
        ['1.weight']
    """
    known = set(names or ())
    found = find_prunable(model, lambda _, name: name in known, computed=False)
    remember(model, found)


def forget(model: nn.Module) -> None:
    """Forget which weights of a model took part.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> remember(model, find_prunable(model))
        >>> forget(model)
        >>> participants(model) is None
        True
    """
    for module in unwrap(model).modules():
        _attributes.pop(module, None)
        _told.pop(module, None)


def took_part(module: nn.Module, name: str) -> bool:
    """Return whether a weight took part; a filter for `find_prunable`.

    Args:
        module: the module that holds it.
        name: its name, which ends with its attribute in the module.

    Example:
        >>> took_part(nn.Linear(2, 2), "fc.weight")
        False
    """
    return name.rpartition(".")[2] in _attributes.get(module, ())


def participants(model: nn.Module) -> list[str] | None:
    """Return the names of the weights that took part; None if none is known.

    Example:
        >>> participants(nn.Linear(2, 2)) is None
        True
    """
    if not any(module in _attributes for module in unwrap(model).modules()):
        return None
    return [item.name for item in find_prunable(model, took_part, computed=False)]


@dataclass(frozen=True)
class Chosen:
    """The weights that a measurement is about.

    Attributes:
        weights: the weights.
        others: further weights of the model that are prunable by default, such as frozen or
            excluded ones.
        remembered: whether the weights are those that took part in sparse training.

    Example:
        >>> chosen = Chosen(find_prunable(nn.Linear(4, 2)), [], remembered=False)
        >>> sum(item.parameter.numel() for item in chosen.weights)
        8
    """

    weights: list[Prunable]
    others: list[Prunable]
    remembered: bool


def choose(model: nn.Module, include: Filters = None, exclude: Filters = None) -> Chosen:
    """Return the weights to measure: those of `include`, or those that took part, or the default.

    Weights that are computed from other parameters are left out, unless `include` matches them. If
    they took part, they are an error.

    Args:
        model: the model.
        include, exclude: as for `find_prunable`.

    Raises:
        ConfigurationError: as for `find_prunable`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> remember(model, find_prunable(model, exclude="1.*"))
        >>> chosen = choose(model)
        >>> [item.name for item in chosen.weights], [item.name for item in chosen.others]
        (['0.weight'], ['1.weight'])
    """
    remembered = include is None and participants(model) is not None
    if include is None:
        # A weight that took part must not be missing, such as after torch.nn.utils.prune.
        filters = took_part if remembered else None
        weights = find_prunable(model, filters, exclude, computed=remembered)
    else:
        weights = find_prunable(model, include, exclude)
    held = {id(item.parameter) for item in weights}
    default = find_prunable(model, computed=False)
    others = [item for item in default if id(item.parameter) not in held]
    return Chosen(weights, others, remembered)


def tell_once(model: nn.Module) -> bool:
    """Return True at the first call for a model, until it is sparsified again.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> tell_once(model), tell_once(model)
        (True, False)
    """
    model = unwrap(model)
    first = model not in _told
    _told[model] = True
    return first
