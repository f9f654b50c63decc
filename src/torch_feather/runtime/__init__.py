"""Sparse networks that are really faster on CPUs (needs llvmlite)."""

from .capture import CaptureError
from .choose import Choice
from .costs import layer_milliseconds
from .kernels import RuntimeMissingError
from .module import InputError, SparseModule, compile_sparse

__all__ = [
    "CaptureError",
    "Choice",
    "InputError",
    "RuntimeMissingError",
    "SparseModule",
    "compile_sparse",
    "layer_milliseconds",
]
