"""Which parameters of a model take part in sparsification."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .errors import ConfigurationError

Filter = str | re.Pattern[str] | type[nn.Module] | Callable[[nn.Module, str], bool]
Filters = Filter | Iterable[Filter] | None

# Weights of these modules are prunable; their biases, and every other parameter, never are
# unless `include` asks for them. Subclasses count as their base.
WEIGHTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.modules.conv._ConvNd: ("weight",),
    nn.Linear: ("weight",),
    nn.Bilinear: ("weight",),
    nn.MultiheadAttention: ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


@dataclass(frozen=True, eq=False)
class Prunable:
    """One weight tensor that takes part: where it lives and what it is."""

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter


def find_prunable(
    model: nn.Module, include: Filters = None, exclude: Filters = None
) -> list[Prunable]:
    """The prunable weights of `model`, in the order of `named_modules`, tied ones once.

    By default: weights of convolutions, linear layers and attention projections. Biases, norms
    and embeddings are not; neither is a linear weight that is tied to an embedding.

    Args:
        model: any module, also one wrapped by `torch.compile` or DistributedDataParallel.
        include: replaces the default choice. A glob on the dotted parameter name
            (``"blocks.*.weight"``), a compiled regex (searched), a module type (its parameters
            with two or more dimensions), a callable ``(module, parameter_name) -> bool``, or
            several of these.
        exclude: leaves out what it matches, in the same forms.

    Raises:
        ConfigurationError: `model` is no module; or a weight that would take part is computed
            from other parameters (parametrized, weight-normed) or has no shape yet (lazy modules).
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    chosen: dict[int, Prunable] = {}
    embedded = {
        id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    }
    for module_name, module in unwrap(model).named_modules():
        module_name = module_name.replace("_orig_mod.", "").removesuffix("_orig_mod")
        for attribute in _candidates(module):
            name = f"{module_name}.{attribute}" if module_name else attribute
            parameter = module._parameters.get(attribute)
            if include is None:
                wanted = attribute in _default_weights(module) and id(parameter) not in embedded
            else:
                wanted = _matches(include, module, name, parameter)
            if not wanted or (exclude is not None and _matches(exclude, module, name, parameter)):
                continue
            if parameter is None:
                raise ConfigurationError(
                    f"{name} is computed from other parameters ({type(module).__name__} is "
                    "parametrized or weight-normed), so its zeros would not last. Remove the "
                    f"parametrization first, or leave the layer out: exclude={name!r}."
                )
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ConfigurationError(
                    f"{name} has no shape yet ({type(module).__name__} is lazy). Run one batch "
                    "through the model before calling this."
                )
            chosen.setdefault(id(parameter), Prunable(name, module, attribute, parameter))
    return list(chosen.values())


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside wrappers of torch.compile and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _default_weights(module: nn.Module) -> tuple[str, ...]:
    return next((names for kind, names in WEIGHTS.items() if isinstance(module, kind)), ())


def _candidates(module: nn.Module) -> Iterator[str]:
    """Parameters of `module` itself, and default weights hidden by a parametrization."""
    yield from (name for name, parameter in module._parameters.items() if parameter is not None)
    for name in _default_weights(module):
        # Not getattr: a parametrization may change its own state when it is evaluated.
        computed = isinstance(getattr(type(module), name, None), property)
        if name not in module._parameters and (computed or name in module.__dict__):
            yield name


def _matches(filters: Any, module: nn.Module, name: str, parameter: nn.Parameter | None) -> bool:
    if isinstance(filters, str):
        return fnmatchcase(name, filters)
    if isinstance(filters, re.Pattern):
        return filters.search(name) is not None
    if isinstance(filters, type):
        return isinstance(module, filters) and (parameter is None or parameter.dim() >= 2)
    if callable(filters):
        return bool(filters(module, name))
    if isinstance(filters, Iterable):
        return any(_matches(one, module, name, parameter) for one in filters)
    raise ConfigurationError(
        f"include and exclude take a glob, a compiled regex, a module type, a callable "
        f"(module, name) -> bool, or several of these; got {filters!r}."
    )
