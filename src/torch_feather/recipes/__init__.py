"""Recipes: the paper's training settings, small ones, and fine-tuning; one YAML file each."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

from ..errors import ConfigurationError, nearest


def available_recipes() -> dict[str, str]:
    """Return the recipes by name, each with the first comment of its file.

    Example:
        >>> [name for name in available_recipes() if name.startswith("cifar")]
        ['cifar10', 'cifar100-small', 'cifar100-vit-small', 'cifar100']
    """
    found = {}
    for file in sorted(resources.files(__package__).iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").splitlines()[0]
            found[file.name.removesuffix(".yaml")] = first.removeprefix("# ")
    return found


def recipe_values(name: str) -> dict[str, Any]:
    """Return the settings of a recipe, as nested sections.

    Raises:
        ConfigurationError: no recipe has this name; the message names the nearest one.

    Example:
        >>> recipe_values("cifar100")["optimizer"]["lr"]
        0.1
    """
    known = available_recipes()
    if name not in known:
        raise ConfigurationError(
            f"unknown recipe {name!r}{nearest(name, known)} Known are {', '.join(known)}. "
            "Pass a file of your own with --config."
        )
    text = resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
