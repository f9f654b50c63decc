"""Configurations as YAML files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigurationError
from .keys import apply, upgrade
from .plain_yaml import parse_yaml, read_small_text
from .schema import Config


def to_dict(config: Config) -> dict[str, Any]:
    """Return all fields as nested plain values.

    Example:
        >>> to_dict(Config())["optimizer"]["momentum"]
        0.9
    """
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """Return `config` as YAML; `load_config` reads an equal configuration from it.

    Example:
        >>> print(to_yaml(Config(seed=3)).splitlines()[10])
        seed: 3
    """
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ConfigurationError: the file does not exist, is not plain, small YAML (see `parse_yaml`), or
            holds no mapping.
    """
    text = read_small_text(path)
    try:
        values = parse_yaml(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}, {error}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: expected keys and values, such as 'epochs: 10'")
    return values


def load_config(path: Path) -> Config:
    """Read a stored configuration, such as the config.yaml of a run.

    Fields that the file does not name have their defaults. Files of version 0.1 are supported.

    Raises:
        ConfigurationError: the file cannot be read, or has an unknown key or a wrong value.
    """
    return apply(Config(), upgrade(read_yaml(path)), str(path))
