"""The trainer behind `feather train`: configuration, data, loop, checkpoints.

It is a user of the library like any other: `loop.py` attaches a sparsifier with the same two
lines that the README shows.
"""

from .config import Config, load_config, resolve_config
from .loop import train

__all__ = ["Config", "load_config", "resolve_config", "train"]
