"""Which parameters of a model are prunable: the default choice, and filters that change it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapters import is_adapter_part
from .errors import ConfigurationError, some
from .filters import (
    Filter,
    Filters,
    flat_filters,
    matches_glob,
    nothing_matched,
    text_of,
)
from .scripted import check_not_scripted

Convolution = nn.modules.conv._ConvNd

# Parameters that are prunable by default, by the class of their module (subclasses included). All
# other parameters, such as biases, are prunable only if `include` matches them.
WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    Convolution: ("weight",),
    nn.Linear: ("weight",),
    nn.Bilinear: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
# The same for linear layers of other libraries, by name, so that they need not be imported. Their
# weight has shape (inputs, outputs). GPT-2 consists of these.
FOREIGN_WEIGHTS = {"transformers.pytorch_utils.Conv1D": ("weight",)}
# In `include`, this word stands for the default choice.
DEFAULT = "default"


@dataclass(frozen=True, eq=False)
class Prunable:
    """A prunable weight tensor.

    Attributes:
        name: dotted name of the parameter in the model; the first one if it has several.
        module: module that holds it.
        attribute: name of the parameter in this module.
        parameter: the parameter.

    Example:
        >>> item = find_prunable(nn.Sequential(nn.Linear(4, 2)))[0]
        >>> item.name, item.attribute, item.parameter.shape
        ('0.weight', 'weight', torch.Size([2, 4]))
    """

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter


# long: the docstring lists the forms of filters.
def find_prunable(
    model: nn.Module,
    include: Filters = None,
    exclude: Filters = None,
    *,
    frozen: bool = True,
    computed: bool = True,
) -> list[Prunable]:
    """Return the prunable weights of a model, in the order of `named_modules`; tied ones once.

    By default these are the weights of convolutions, linear layers and attention projections.
    Biases, norms, embeddings, adapters (LoRA), and linear weights that are tied to an embedding are
    not prunable. A weight with several names (tied, or of a module used twice) is matched by
    each of them.

    A filter has one of these forms; `include` and `exclude` take one, or several in an iterable:

    - A glob on the dotted parameter name, such as ``"blocks.*.weight"``; ``*`` matches dots too.
      Brackets match themselves, or one of the characters within: ``"stage[12].*"``.
    - A compiled regex, searched in the name.
    - A module type. Within modules of this type, `include` chooses the default weights, and the
      modules' own parameters with two or more dimensions. `exclude` matches all parameters.
    - A callable ``(module that holds it, parameter name) -> bool``.
    - In `include`, the word ``"default"``: the default choice, to which other filters add.

    Args:
        model: any module, also one wrapped by `torch.compile` or DistributedDataParallel.
        include: filters that replace the default choice.
        exclude: filters of weights that are not prunable.
        frozen: whether to return weights that do not require gradients too.
        computed: whether a chosen weight that is computed from other parameters is an error;
            otherwise it is left out, and so is one without a shape.

    Raises:
        ConfigurationError: `model` is not a module, or contains TorchScript; or a glob, regex or
            type matches nothing. Also a chosen weight that is computed from other parameters
            (parametrized, weight-normed) or has no shape yet (lazy modules).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> [item.name for item in find_prunable(model)]
        ['0.weight', '2.weight']
        >>> [item.name for item in find_prunable(model, exclude="2.*")]
        ['0.weight']
    """
    names = list(_named(unwrap(model)))
    if include is None:
        chosen = [one for one in names if one.by_default]
    else:
        chosen = _matched(names, include, "include", _includes)
    excluded = (
        set()
        if exclude is None
        else {one.key for one in _matched(names, exclude, "exclude", _matches)}
    )
    found: dict[Any, Prunable] = {}
    for one in chosen:
        if one.key in excluded or one.key in found:
            continue
        if problem := _problem(one):
            if computed:
                raise ConfigurationError(problem)
            continue
        assert one.parameter is not None
        found[one.key] = Prunable(one.name, one.module, one.attribute, one.parameter)
    return [item for item in found.values() if frozen or item.parameter.requires_grad]


def _problem(one: _Named) -> str | None:
    """Return why a parameter cannot be pruned; None if it can."""
    name, kind = one.name, type(one.module).__name__
    if one.parameter is None:
        return (
            f"{name} is computed from other parameters ({kind} is parametrized or weight-normed), "
            "so its zeros would not last. Remove the parametrization first, or leave the layer "
            f"out: exclude={name!r}."
        )
    if is_lazy(one.parameter):
        return f"{name} has no shape yet ({kind} is lazy). Run one batch through the model first."
    return None


def convolutions(model: nn.Module) -> list[tuple[str, Convolution]]:
    """Return all convolutions with the names of their weights, prunable or not, in model order.

    Example:
        >>> [name for name, _ in convolutions(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2)))]
        ['0.weight']
    """
    return [
        (one.name, one.module)
        for one in _named(unwrap(model))
        if isinstance(one.module, Convolution) and one.attribute == "weight"
    ]


def group_prunable(
    model: nn.Module, prunable: Sequence[Prunable], filters: Iterable[Filter]
) -> list[int]:
    """Return for each prunable weight the position of the first filter that matches it.

    Args:
        model: the model.
        prunable: its prunable weights.
        filters: as for `find_prunable`; a type matches all parameters within modules of it.

    Raises:
        ConfigurationError: a filter is left with no weight, or a weight with no filter.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> group_prunable(model, find_prunable(model), ["1.*", "*"])
        [1, 0]
    """
    by_parameter: dict[int, list[_Named]] = {}
    for name in _named(unwrap(model)):
        by_parameter.setdefault(id(name.parameter), []).append(name)
    aliases = [by_parameter[id(item.parameter)] for item in prunable]
    groups = [-1] * len(prunable)
    for g, one in enumerate(filters):
        candidates = [name for names in aliases for name in names]
        hits = {candidates[i] for i in _hits(one, candidates, _matches)}
        matching = [i for i, names in enumerate(aliases) if not hits.isdisjoint(names)]
        if not matching:
            raise _nothing_matched("sparsity", one, candidates, "prunable weight")
        own = [i for i in matching if groups[i] < 0]
        if not own:
            raise ConfigurationError(
                f"sparsity: every weight that {text_of(one)} matches is matched by an entry before "
                "it already. The first match counts: put the special ones first."
            )
        for i in own:
            groups[i] = g
    rest = [item.name for item, group in zip(prunable, groups, strict=True) if group < 0]
    if rest:
        raise ConfigurationError(
            f"sparsity has no target for {some(rest)}. Add one for all others as the last entry, "
            'such as "*": 0.9 (0 keeps them dense), or leave them out: exclude=.'
        )
    return groups


def is_lazy(parameter: Any) -> bool:
    """Return whether a parameter has no shape yet.

    Example:
        >>> is_lazy(nn.LazyLinear(2).weight)
        True
    """
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module inside wrappers of torch.compile and DistributedDataParallel.

    Raises:
        ConfigurationError: `model` is not a module.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> unwrap(torch.compile(model)) is model
        True
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


@dataclass(frozen=True, eq=False)
class _Named:
    """A parameter under one of its names.

    Attributes:
        name: dotted name in the model.
        module: module that holds it.
        attribute: its name in this module.
        parameter: the parameter; None if it is computed from others.
        path: modules from the model to `module`.
        by_default: whether it belongs to the default choice.
    """

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter | None
    path: tuple[nn.Module, ...]
    by_default: bool

    @property
    def key(self) -> Any:
        """The same for all names of a parameter."""
        if self.parameter is None:
            return id(self.module), self.attribute
        return id(self.parameter)


def _named(model: nn.Module) -> Iterator[_Named]:
    """Yield every parameter under every name, and default weights hidden by a parametrization."""
    check_not_scripted(model)
    embedded = {
        id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    }

    def walk(prefix: str, path: tuple[nn.Module, ...], adapter: bool) -> Iterator[_Named]:
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
            default = name in weights and id(parameter) not in embedded and not adapter
            yield _Named(prefix + name, module, name, parameter, path, default)
        for name, child in module._modules.items():
            if child is not None and child not in path:
                inner = prefix if name == "_orig_mod" else f"{prefix}{name}."
                yield from walk(inner, (*path, child), adapter or is_adapter_part(module, name))

    yield from walk("", (model,), False)


def default_weights(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's own parameters that are prunable by default.

    Example:
        >>> default_weights(nn.Linear(2, 2)), default_weights(nn.LayerNorm(2))
        (('weight',), ())
    """
    for kind, names in WEIGHTS.items():
        if isinstance(module, kind):
            return names
    kinds = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
    return next((FOREIGN_WEIGHTS[kind] for kind in kinds if kind in FOREIGN_WEIGHTS), ())


def output_groups(module: nn.Module) -> int | None:
    """Return in how many groups of dimension 0 a default weight has its outputs in dimension 1.

    Most layers have their outputs in dimension 0; the result for them is None.

    Example:
        >>> output_groups(nn.Conv2d(4, 4, 3)), output_groups(nn.ConvTranspose2d(4, 4, 3, groups=2))
        (None, 2)
    """
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return module.groups
    foreign = default_weights(module) and not isinstance(module, tuple(WEIGHTS))
    return 1 if foreign else None


def _hits(one: Filter, names: Sequence[_Named], matches: Callable[[Any, _Named], bool]) -> set[int]:
    """Return the positions of the names that a filter matches; an exact name matches no other."""
    if isinstance(one, str) and not set("*?") & set(one):
        exact = {i for i, name in enumerate(names) if name.name == one}
        if exact:
            return exact
    return {i for i, name in enumerate(names) if matches(one, name)}


def _matched(
    names: Sequence[_Named], filters: Any, role: str, matches: Callable[[Any, _Named], bool]
) -> list[_Named]:
    """Return the names that at least one of the filters matches, in order."""
    found: set[int] = set()
    for one in list(flat_filters(filters)):
        hits = _hits(one, names, matches)
        # A callable may be a rule for any model, such as "all small layers", and match nothing.
        may_be_empty = callable(one) or (role, one) == ("include", DEFAULT)
        if not hits and (isinstance(one, type) or not may_be_empty):
            raise _nothing_matched(role, one, names, "parameter")
        found |= hits
    return [names[i] for i in sorted(found)]


def _includes(one: Filter, named: _Named) -> bool:
    """Return whether a filter of `include` matches; a type matches weights alone."""
    if one == DEFAULT and named.by_default:
        return True
    if isinstance(one, type):
        own = isinstance(named.module, one) and _is_matrix(named.parameter)
        return own or (named.by_default and _matches(one, named))
    return _matches(one, named)


def _matches(one: Filter, named: _Named) -> bool:
    """Return whether a filter matches; a type matches everything within modules of it."""
    if isinstance(one, str):
        return matches_glob(one, named.name)
    if isinstance(one, re.Pattern):
        return one.search(named.name) is not None
    if isinstance(one, type):
        return any(isinstance(module, one) for module in named.path)
    return bool(one(named.module, named.name))


def _is_matrix(parameter: nn.Parameter | None) -> bool:
    """Return whether a parameter has two or more dimensions, or none that are known yet."""
    if parameter is None or is_lazy(parameter):
        return True
    return parameter.dim() >= 2


def _nothing_matched(
    role: str, one: Filter, candidates: Sequence[_Named], noun: str
) -> ConfigurationError:
    """Return the error for a filter without a match; it names similar candidates."""
    kinds = (type(m).__name__ for c in candidates for m in c.path[1:] or c.path)
    return nothing_matched(role, one, [c.name for c in candidates], kinds, noun)
