"""The paper's settings, and two small ones, as data: one YAML file each."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

from ..errors import ConfigurationError, nearest


def available_recipes() -> dict[str, str]:
    """Name to one line of description (the file's first comment)."""
    found = {}
    for file in sorted(resources.files(__package__).iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").splitlines()[0]
            found[file.name.removesuffix(".yaml")] = first.removeprefix("# ")
    return found


def recipe_values(name: str) -> dict[str, Any]:
    """The settings of the recipe `name`; `ConfigurationError` names the nearest known one."""
    known = available_recipes()
    if name not in known:
        raise ConfigurationError(
            f"unknown recipe {name!r}{nearest(name, known)} Known are {', '.join(known)} "
            "(a file of your own goes to --config)."
        )
    text = resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
