"""The trainer behind `feather train`: configuration, data, training loop and checkpoints.

The trainer uses only the documented parts of the library: `task.py` attaches a sparsifier with the
same two lines that the README shows.
"""

from .config import Config, load_config, resolve_config
from .loop import train

__all__ = ["Config", "load_config", "resolve_config", "train"]
