"""Sparse inference on CPUs: `compile_sparse`, and measured costs of weights (needs llvmlite)."""

from ..deprecation import renamed_names
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

__getattr__ = renamed_names(__name__, {"Choice": "LayerTuning"})
