"""Sparse inference on CPUs: `compile_sparse`, and measured costs of weights (needs llvmlite)."""

import warnings
from typing import Any

from .costs import layer_milliseconds
from .errors import CaptureError, InputError, RuntimeMissingError
from .module import SparseModule, compile_sparse
from .saved import load_compiled, save_compiled
from .tuning import LayerTuning

__all__ = [
    "CaptureError",
    "InputError",
    "LayerTuning",
    "RuntimeMissingError",
    "SparseModule",
    "compile_sparse",
    "layer_milliseconds",
    "load_compiled",
    "save_compiled",
]


def __getattr__(name: str) -> Any:
    if name == "Choice":
        message = (
            "torch_feather.runtime.Choice is deprecated and will be removed in the next release. "
            "Use LayerTuning."
        )
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return LayerTuning
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
