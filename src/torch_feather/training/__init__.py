"""The trainer behind `feather train`: configuration, data, training loop and checkpoints.

The trainer uses only the documented parts of the library: `task.py` attaches a sparsifier with the
same two lines that the README shows.
"""

from typing import TYPE_CHECKING, Any

from .config import Config, load_config, resolve_config

if TYPE_CHECKING:
    from .loop import train

__all__ = ["Config", "load_config", "resolve_config", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # imports PyTorch, which settings do not need
        from .loop import train

        globals()["train"] = train
        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
