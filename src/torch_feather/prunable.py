"""Which parameters of a model take part in sparsification."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .errors import ConfigurationError, some

Filter = str | re.Pattern[str] | type[nn.Module] | Callable[[nn.Module, str], bool]
Filters = Filter | Iterable[Filter] | None
Convolution = nn.modules.conv._ConvNd

# Weights of these modules are prunable; their biases, and every other parameter, never are
# unless `include` asks for them. Subclasses count as their base.
WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    Convolution: ("weight",),
    nn.Linear: ("weight",),
    nn.Bilinear: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
# So are those of other libraries' linear layers, which are known by name: GPT-2 is built of these.
# Their weight is of shape (inputs, outputs).
FOREIGN_WEIGHTS = {"transformers.pytorch_utils.Conv1D": ("weight",)}


@dataclass(frozen=True, eq=False)
class Prunable:
    """One weight tensor that takes part: where it lives and what it is."""

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter


def find_prunable(
    model: nn.Module, include: Filters = None, exclude: Filters = None, *, frozen: bool = True
) -> list[Prunable]:
    """The prunable weights of `model`, in the order of `named_modules`, tied ones once.

    By default: weights of convolutions, linear layers and attention projections. Biases, norms
    and embeddings are not; neither is a linear weight that is tied to an embedding. A weight with
    several names (tied, or of a module that is used twice) is matched if one of them is.

    Args:
        model: any module, also one wrapped by `torch.compile` or DistributedDataParallel.
        include: replaces the default choice. A glob on the dotted parameter name
            (``"blocks.*.weight"``; ``*`` goes across dots), a compiled regex (searched in the
            name), a module type (its own parameters with two or more dimensions, and the default
            choice within it), a callable ``(module that holds it, parameter_name) -> bool``, or
            several of these.
        exclude: leaves out what it matches, in the same forms; of a module type, all within it.
        frozen: also those that do not require gradients.

    Raises:
        ConfigurationError: `model` is no module; a glob, regex or type matches nothing in it; or
            a weight that would take part is computed from other parameters (parametrized,
            weight-normed) or has no shape yet (lazy modules).
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    places = list(_places(unwrap(model)))
    if include is None:
        chosen = [place for place in places if place.by_default]
    else:
        chosen = _matched(places, include, "include", _asks_for)
    left_out = (
        set()
        if exclude is None
        else {place.key for place in _matched(places, exclude, "exclude", _concerns)}
    )
    found: dict[Any, Prunable] = {}
    for place in chosen:
        if place.key in left_out or place.key in found:
            continue
        name, kind = place.name, type(place.module).__name__
        if place.parameter is None:
            raise ConfigurationError(
                f"{name} is computed from other parameters ({kind} is parametrized or "
                "weight-normed), so its zeros would not last. Remove the parametrization first, "
                f"or leave the layer out: exclude={name!r}."
            )
        if isinstance(place.parameter, nn.parameter.UninitializedParameter):
            raise ConfigurationError(
                f"{name} has no shape yet ({kind} is lazy). Run one batch through the model before "
                "calling this."
            )
        found[place.key] = Prunable(name, place.module, place.attribute, place.parameter)
    return [item for item in found.values() if frozen or item.parameter.requires_grad]


def convolutions(model: nn.Module) -> list[tuple[str, Convolution]]:
    """The names of their weights and the layers, in the model's order, taking part or not."""
    return [
        (place.name, place.module)
        for place in _places(unwrap(model))
        if isinstance(place.module, Convolution) and place.attribute == "weight"
    ]


def list_filters(filters: Filters) -> list[Filter] | None:
    """Filters in a form that can be read twice."""
    return None if filters is None else list(_flat(filters))


def group_prunable(
    model: nn.Module, prunable: Sequence[Prunable], filters: Iterable[Filter]
) -> list[int]:
    """Which filter each prunable weight belongs to, by number: the first one that matches it.

    Raises:
        ConfigurationError: a filter is left with no weight, or a weight with no filter.
    """
    names: dict[int, list[_Place]] = {}
    for place in _places(unwrap(model)):
        names.setdefault(id(place.parameter), []).append(place)
    aliases = [names[id(item.parameter)] for item in prunable]
    groups = [-1] * len(prunable)
    for g, one in enumerate(filters):
        matching = [i for i, a in enumerate(aliases) if any(_concerns(one, p) for p in a)]
        if not matching:
            candidates = [place for places in aliases for place in places]
            raise _nothing_matched("sparsity", one, candidates, "prunable weight")
        mine = [i for i in matching if groups[i] < 0]
        if not mine:
            raise ConfigurationError(
                f"sparsity: every weight that {_text(one)} matches is matched by an entry before "
                "it already. The first match counts: put the special ones first."
            )
        for i in mine:
            groups[i] = g
    rest = [item.name for item, group in zip(prunable, groups, strict=True) if group < 0]
    if rest:
        raise ConfigurationError(
            f"sparsity names no share for {some(rest)}. Add one for all others as the last entry, "
            'such as "*": 0.9 (0 keeps them dense), or leave them out: exclude=.'
        )
    return groups


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside wrappers of torch.compile and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


@dataclass(frozen=True, eq=False)
class _Place:
    """A parameter under one of its names; None is one that is computed from others."""

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter | None
    path: tuple[nn.Module, ...]  # from the model to `module`
    by_default: bool

    @property
    def key(self) -> Any:
        """The same for all names of a parameter."""
        if self.parameter is None:
            return id(self.module), self.attribute
        return id(self.parameter)


def _places(model: nn.Module) -> Iterator[_Place]:
    """Every parameter under every name, and default weights hidden by a parametrization."""
    embedded = {
        id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    }

    def walk(prefix: str, path: tuple[nn.Module, ...]) -> Iterator[_Place]:
        module = path[-1]
        weights = default_weights(module)
        names = [name for name, p in module._parameters.items() if p is not None]
        for name in weights:
            # Not getattr: a parametrization may change its own state when it is evaluated.
            computed = isinstance(getattr(type(module), name, None), property)
            if name not in module._parameters and (computed or name in module.__dict__):
                names.append(name)
        for name in names:
            parameter = module._parameters.get(name)
            default = name in weights and id(parameter) not in embedded
            yield _Place(prefix + name, module, name, parameter, path, default)
        for name, child in module._modules.items():
            if child is not None and child not in path:
                inner = prefix if name == "_orig_mod" else f"{prefix}{name}."
                yield from walk(inner, (*path, child))

    yield from walk("", (model,))


def default_weights(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of `module` itself that are weights by default."""
    for kind, names in WEIGHTS.items():
        if isinstance(module, kind):
            return names
    kinds = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
    return next((FOREIGN_WEIGHTS[kind] for kind in kinds if kind in FOREIGN_WEIGHTS), ())


def output_groups(module: nn.Module) -> int | None:
    """In how many groups of dimension 0 a default weight has its outputs along dimension 1.

    None where dimension 0 are the outputs, as of most layers.
    """
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return module.groups
    foreign = default_weights(module) and not isinstance(module, tuple(WEIGHTS))
    return 1 if foreign else None


def _matched(
    places: Sequence[_Place], filters: Any, role: str, matches: Callable[[Any, _Place], bool]
) -> list[_Place]:
    """The places that one of the filters matches, in order."""
    every = list(_flat(filters))
    found: set[int] = set()
    for one in every:
        hits = {i for i, place in enumerate(places) if matches(one, place)}
        # A callable may be a rule for any model, such as all small layers, and find none in this.
        if not hits and (isinstance(one, str | re.Pattern | type)):
            raise _nothing_matched(role, one, places, "parameter")
        found |= hits
    return [places[i] for i in sorted(found)]


def _flat(filters: Any) -> Iterator[Filter]:
    rule = callable(filters) and not isinstance(filters, nn.Module)
    if isinstance(filters, str | re.Pattern | type) or rule:
        yield filters
    elif isinstance(filters, Iterable):
        for one in filters:
            yield from _flat(one)
    else:
        raise ConfigurationError(
            "include and exclude take a glob, a compiled regex, a module type, a callable "
            f"(module, name) -> bool, or several of these; got {filters!r}."
        )


def _asks_for(one: Filter, place: _Place) -> bool:
    """Whether a filter of `include` matches: of a type, what is a weight."""
    if isinstance(one, type):
        own = isinstance(place.module, one) and _is_matrix(place.parameter)
        return own or (place.by_default and _concerns(one, place))
    return _concerns(one, place)


def _concerns(one: Filter, place: _Place) -> bool:
    """Whether a filter matches; a type, everything within modules of it."""
    if isinstance(one, str):
        return fnmatchcase(place.name, one)
    if isinstance(one, re.Pattern):
        return one.search(place.name) is not None
    if isinstance(one, type):
        return any(isinstance(module, one) for module in place.path)
    return bool(one(place.module, place.name))


def _is_matrix(parameter: nn.Parameter | None) -> bool:
    if parameter is None or isinstance(parameter, nn.parameter.UninitializedParameter):
        return True
    return parameter.dim() >= 2


def _nothing_matched(
    role: str, one: Filter, places: Sequence[_Place], what: str
) -> ConfigurationError:
    """The error of a filter without a match, which names what comes near."""
    if isinstance(one, type):
        kinds = dict.fromkeys(type(m).__name__ for p in places for m in p.path[1:] or p.path)
        hint = f" There are modules of type {some(list(kinds), 8)}."
        return ConfigurationError(
            f"{role}: {_text(one)} holds no {what} here, so there is nothing to prune in it.{hint}"
        )
    names = list(dict.fromkeys(place.name for place in places))
    text = one if isinstance(one, str) else one.pattern if isinstance(one, re.Pattern) else ""
    core = text.replace("\\", "").strip("*.^$")
    modules = {f"{name.rpartition('.')[0]}.*" for name in names if "." in name}
    if f"{core}.*" in modules and text != f"{core}.*":
        hint = f"; did you mean {core + '.*'!r}?"
    elif core and any(core in name for name in names):
        hint = f"; did you mean {f'*{core}*'!r}?"
    elif near := get_close_matches(text, [*names, *modules], n=3):
        hint = f"; did you mean {' or '.join(map(repr, near))}?"
    else:
        hint = f". There are {some(names, 8)}."
    return ConfigurationError(
        f"{role}: {_text(one)} matches the name of no {what}, so there is nothing to prune in "
        f"it{hint}"
    )


def _text(one: Filter) -> str:
    return one.__name__ if isinstance(one, type) else repr(one)
