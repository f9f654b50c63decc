"""The trainer behind `feather train`: configuration, data, training loop and checkpoints.

The trainer uses only the documented parts of the library: `task.py` attaches a sparsifier with the
same two lines that the README shows.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import Config, load_config, resolve_config

if TYPE_CHECKING:
    from .loggers import LoggedRun, Logger
    from .loop import train

__all__ = ["Config", "LoggedRun", "Logger", "load_config", "resolve_config", "train"]

# These import PyTorch, which settings do not need.
_LATER = {"train": "loop", "Logger": "loggers", "LoggedRun": "loggers"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return found
