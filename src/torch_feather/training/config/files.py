"""Configurations as YAML files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigurationError
from .keys import apply, upgrade
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
        >>> print(to_yaml(Config(seed=3)).splitlines()[10])
        seed: 3
    """
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Args:
        path: the file, UTF-8.

    Raises:
        ConfigurationError: the file does not exist, is not valid YAML, or holds no mapping.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.yaml"
        >>> _ = path.write_text("epochs: 10\\noptimizer: {lr: 0.05}\\n")
        >>> read_yaml(path)
        {'epochs': 10, 'optimizer': {'lr': 0.05}}
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        position = f", line {line + 1}" if line is not None else ""
        raise ConfigurationError(f"{path}{position}: not valid YAML: {first}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: expected keys and values, such as 'epochs: 10'")
    return values


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
    return apply(Config(), upgrade(read_yaml(path)), str(path))
