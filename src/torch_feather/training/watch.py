"""Deprecated names of `torch_feather.training.callbacks`."""

from . import callbacks
from .deprecation import renamed_names

__getattr__ = renamed_names(
    __name__, {"Watch": "Callback", "Watches": "Callbacks"}, callbacks.__name__
)
