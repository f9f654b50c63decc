"""Sparse training for PyTorch: two lines in any training loop.

import torch_feather as feather

sparsifier = feather.sparsify(model, optimizer, sparsity=0.95, total_steps=steps)
...  # the training loop, unchanged
sparsifier.finalize()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _moved
from ._version import __version__
from .average import LatentAverage
from .errors import (
    ConfigurationError,
    FeatherError,
    FeatherWarning,
    FileFormatError,
    NonFiniteWeightError,
    StateError,
)
from .finetune import FixedMask, keep_zeros
from .info import engine_info
from .measure import count_flops, recalibrate_batchnorm, report, sparsity
from .methods import available_methods, register_method
from .operators import power_threshold
from .sparsifier import Sparsifier
from .sparsify import sparsify

if TYPE_CHECKING:
    from . import models
    from .export import load_sparse, save_sparse
    from .native import export_c, export_native
    from .runtime import compile_sparse, load_compiled, save_compiled

# What is below the core is imported when it is first used.
_LAZY = {
    "compile_sparse": ".runtime",
    "export_c": ".native",
    "export_native": ".native",
    "load_compiled": ".runtime",
    "load_sparse": ".export",
    "models": ".models",
    "save_compiled": ".runtime",
    "save_sparse": ".export",
    "testing": ".testing",
}

__all__ = [
    "ConfigurationError",
    "FeatherError",
    "FeatherWarning",
    "FileFormatError",
    "FixedMask",
    "LatentAverage",
    "NonFiniteWeightError",
    "Sparsifier",
    "StateError",
    "__version__",
    "available_methods",
    "compile_sparse",
    "count_flops",
    "engine_info",
    "export_c",
    "export_native",
    "keep_zeros",
    "load_compiled",
    "load_sparse",
    "models",
    "power_threshold",
    "recalibrate_batchnorm",
    "register_method",
    "report",
    "save_compiled",
    "save_sparse",
    "sparsify",
    "sparsity",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = import_module(_LAZY[name], __name__)
        found = module if _LAZY[name] == f".{name}" else getattr(module, name)
        globals()[name] = found
        return found
    return _moved.attribute(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
