"""Planning a study's runs: all combinations of methods, sparsities and seeds, and their names."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..deprecation import warn_renamed
from ..errors import ConfigurationError, nearest
from ..training import Config, resolve_config
from ..training.config import DENSE, apply, flatten, to_dict
from .options import current_option, name_in_run_names, options_of
from .runs import Run
from .study import GridAxes

# Settings that a run's name shows otherwise, or that do not affect its result.
_NOT_IN_NAME = (
    *("recipe", "method", "sparsity", "seed", "compare_dense", "track_masks"),
    *("data.name", "data.path"),
)
_SYSTEM_IN_NAME = ("system.amp", "system.micro_batch")  # these affect the result


def grid(config: Config, variants: Mapping[str, Mapping[str, Any]], axes: GridAxes) -> list[Run]:
    """Plan a run for each variant, sparsity and seed.

    Seeds are the outermost loop, so all variants finish their first seed early. The dense network
    is trained once for each seed.

    Args:
        config: common settings; each of its options applies to the methods that have it.
        variants: label to the fields of `Config` that define the variant; fields of a section by
            their dotted key, such as `optimizer.clip`.
        axes: sparsities and seeds.

    Returns:
        The runs in training order.

    Raises:
        ConfigurationError: an option that none of the methods has.

    Example:
        >>> variants = {"dense": {"method": "dense"}}
        >>> variants["p = 2"] = {"method": "feather", "options": {"p": 2}}
        >>> axes = GridAxes(sparsities=[0.9, 0.98], seeds=[0])
        >>> [run.name for run in grid(resolve_config("digits"), variants, axes)]
        ['digits-dense-0', 'digits-feather-p2-0.9-0', 'digits-feather-p2-0.98-0']
    """
    known = {variant["method"]: options_of(variant["method"]) for variant in variants.values()}
    for option in config.options:
        if not any(current_option(method, option) in known[method] for method in known):
            raise ConfigurationError(f"None of {', '.join(known)} has an option {option!r}.")
    runs: dict[str, Run] = {}
    for seed, sparsity, label in itertools.product(axes.seeds, axes.sparsities, variants):
        variant = {key: value for key, value in variants[label].items() if "." not in key}
        settings = {key: value for key, value in variants[label].items() if "." in key}
        defaults = known[variant["method"]]
        variant["options"] = _options_of_variant(config, variant, defaults)
        one = replace(config, seed=seed, sparsity=sparsity, compare_dense=False, **variant)
        one = apply(one, settings, label)
        name = run_name(one)
        runs.setdefault(name, Run(name, one, label))
    return list(runs.values())


def _options_of_variant(
    config: Config, variant: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of a variant without those that equal the method's default.

    Equal runs thereby have equal names.
    """
    method = variant["method"]
    options: dict[str, Any] = {}
    for option, value in config.options.items():
        if (name := current_option(method, option)) in defaults:
            options[name] = value
    for option, value in variant.get("options", {}).items():
        name = current_option(method, option)
        if name != option:
            warn_renamed(f"Option {option!r} of method {method!r}", repr(name), stacklevel=5)
        if name not in defaults:
            raise ConfigurationError(
                f"{method} has no option {option!r}{nearest(option, defaults)}"
            )
        options[name] = value
    return {name: value for name, value in options.items() if value != defaults.get(name, ...)}


def run_name(config: Config) -> str:
    """Return the name of a run: recipe, method, sparsity, seed and deviations from the recipe.

    Studies that need the same run find it under the same name.

    Args:
        config: configuration of the run; its recipe must be set.

    Example:
        >>> config = replace(resolve_config("cifar100"), sparsity=0.98, options={"p": 2.0})
        >>> run_name(config)
        'cifar100-feather-p2-0.98-0'
    """
    recipe, recipe_values = _recipe(config.recipe)
    changed = {
        key: value
        for key, value in flatten(to_dict(config)).items()
        if value != recipe_values.get(key, ...)
        and key not in _NOT_IN_NAME
        and (key in _SYSTEM_IN_NAME or not key.startswith("system."))
    }
    parts = [str(config.recipe)]
    if config.data.title != recipe.data.title:
        parts.append(config.data.title)
    if "network" in changed:
        parts.append(changed.pop("network"))
    parts.append(config.method)
    parts += [_name_part(key) + _brief(value) for key, value in changed.items()]
    if config.method != DENSE:
        parts.append(_brief(config.sparsity))
    parts.append(str(config.seed))
    return re.sub(r"[^\w.+-]", "_", "-".join(parts))


@functools.cache
def _recipe(name: str | None) -> tuple[Config, Mapping[str, Any]]:
    """Return a recipe, and its values by key; a study names hundreds of runs of one recipe."""
    recipe = resolve_config(name)
    return recipe, flatten(to_dict(recipe))


def _name_part(key: str) -> str:
    section, _, name = key.rpartition(".")
    return name_in_run_names(name) if section == "options" else name


def _brief(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).lower()
