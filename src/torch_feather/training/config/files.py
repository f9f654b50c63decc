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

    Args:
        config: the configuration.

    Example:
        >>> to_dict(Config())["optimizer"]["momentum"]
        0.9
    """
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """Return `config` as YAML; `load_config` reads an equal configuration from it.

    Args:
        config: the configuration.

    Example:
        >>> "seed: 3" in to_yaml(Config(seed=3)).splitlines()
        True
    """
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def parse_config(text: str, source: str) -> Config:
    """Return the configuration in a text of `to_yaml`.

    Args:
        text: the text.
        source: where it comes from, for messages.

    Raises:
        ConfigurationError: the text is not plain YAML, or has an unknown key or a wrong value.

    Example:
        >>> parse_config(to_yaml(Config(seed=3)), "example").seed
        3
    """
    return apply(Config(), upgrade(_parse_mapping(text, source)), source)


def _parse_mapping(text: str, source: str) -> dict[str, Any]:
    try:
        values = parse_yaml(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"{source}, {error}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{source}: expected keys and values, such as 'epochs: 10'")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Args:
        path: the file, UTF-8.

    Raises:
        ConfigurationError: the file does not exist, is not plain, small YAML (see `parse_yaml`), or
            holds no mapping.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.yaml"
        >>> _ = path.write_text("epochs: 10\\noptimizer: {lr: 0.05}\\n")
        >>> read_yaml(path)
        {'epochs': 10, 'optimizer': {'lr': 0.05}}
    """
    return _parse_mapping(read_small_text(path), str(path))


def load_config(path: Path) -> Config:
    """Read a stored configuration, such as the config.yaml of a run.

    Fields that the file does not name have their defaults. Files of version 0.1 are supported.

    Args:
        path: the YAML file.

    Raises:
        ConfigurationError: the file cannot be read, or has an unknown key or a wrong value.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.yaml"
        >>> _ = path.write_text("epochs: 10\\noptimizer: {lr: 0.05}\\n")
        >>> config = load_config(path)
        >>> config.epochs, config.optimizer.lr, config.batch_size
        (10, 0.05, 128)
    """
    return parse_config(read_small_text(path), str(path))
