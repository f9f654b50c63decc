"""From a recipe, a file and the command line to one configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import ConfigurationError, shorten
from ...import_path import is_import_path
from ...recipes import recipe_values
from .files import read_yaml
from .keys import apply
from .plain_yaml import parse_yaml
from .schema import Config, check_data_name


def resolve_config(
    recipe: str | None = None,
    file: Path | Sequence[Path] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Return the defaults, overridden by the recipe, the file and `overrides`, in this order.

    Args:
        recipe: a name of `torch_feather.recipes.available_recipes()`.
        file: a YAML file, or several, of which later ones override earlier ones.
        overrides: nested sections or dotted keys, as for `apply`.

    Raises:
        ConfigurationError: an unknown recipe or key, a wrong value, or an unreadable file.

    Example:
        >>> config = resolve_config("digits", overrides={"sparsity": 0.9})
        >>> config.network, config.sparsity
        ('resnet8', 0.9)
    """
    config = Config()
    if recipe is not None:
        config = apply(config, recipe_values(recipe), f"recipe {recipe}")
        config = replace(config, recipe=recipe)
    for path in [file] if isinstance(file, Path) else file or ():
        config = apply(config, read_yaml(path), str(path))
    if overrides:
        config = apply(config, overrides, "command line")
    return config


def default_recipe(data: str | None) -> str:
    """Return the recipe for a data set; the recipe for digits if `data` is None.

    Args:
        data: name of a data set.

    Raises:
        ConfigurationError: no data set has this name.

    Example:
        >>> default_recipe("imagefolder"), default_recipe("cifar10"), default_recipe(None)
        ('finetune', 'cifar10', 'digits')
    """
    if data is not None:
        check_data_name(data)
        if is_import_path(data):
            return "finetune"
    others = {"imagefolder": "finetune", "text": "gpt-char", None: "digits"}
    return others.get(data, data or "digits")


def parse_assignments(assignments: list[str], source: str = "--set") -> dict[str, Any]:
    """Parse `key=value` texts. Values are YAML.

    Args:
        assignments: such as `optimizer.lr=0.05`.
        source: the option that they come from, for messages.

    Raises:
        ConfigurationError: a text without `=`, or a value that is not valid YAML.

    Example:
        >>> parse_assignments(["optimizer.lr=0.05", "options.theta=linear(1, 0)"])
        {'optimizer.lr': 0.05, 'options.theta': 'linear(1, 0)'}
    """
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigurationError(
                f"{source} {shorten(text)}: write key=value, such as optimizer.lr=0.05"
            )
        # YAML would read the pattern 2:4 as 124 seconds, and a glob such as *.mlp.* as an alias.
        if re.fullmatch(r"\d+:\d+|\*.*", value):
            values[key.strip()] = value
            continue
        try:
            values[key.strip()] = parse_yaml(value) if value else None
        except ConfigurationError as error:
            raise ConfigurationError(f"{source} {shorten(text)}: {error}") from None
    return values
