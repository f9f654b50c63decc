"""Deprecated names of `torch_feather.training.callbacks`."""

from ..deprecation import renamed_names
from . import callbacks

__getattr__ = renamed_names(
    __name__, {"Watch": "Callback", "Watches": "Callbacks"}, callbacks.__name__
)
