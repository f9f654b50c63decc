"""The configuration of a run: typed, validated, and stored in its directory.

Values come in layers, and later layers win: the defaults, a recipe, a file, the command line.
A key is the dotted name of a field, such as `epochs` or `optimizer.lr`.
"""

from .files import load_config, parse_config, read_yaml, to_dict, to_yaml
from .keys import apply, flatten, known_keys, upgrade
from .optimizer import TIMM, OptimizerConfig
from .resolve import default_recipe, parse_assignments, resolve_config
from .schema import (
    AUTO,
    DATASETS,
    DENSE,
    PRETRAINED,
    Config,
    DataConfig,
    DistillationConfig,
    SystemConfig,
)

__all__ = [
    "AUTO",
    "DATASETS",
    "DENSE",
    "PRETRAINED",
    "TIMM",
    "Config",
    "DataConfig",
    "DistillationConfig",
    "OptimizerConfig",
    "SystemConfig",
    "apply",
    "default_recipe",
    "flatten",
    "known_keys",
    "load_config",
    "parse_assignments",
    "parse_config",
    "read_yaml",
    "resolve_config",
    "to_dict",
    "to_yaml",
    "upgrade",
]
