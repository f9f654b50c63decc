"""Sparse training for PyTorch: two lines in any training loop.

import torch_feather as feather

sparsifier = feather.sparsify(model, optimizer, sparsity=0.95, total_steps=steps)
...  # the training loop, unchanged
sparsifier.finalize()
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import _moved as _moved
from .deprecation import warn_renamed
from .errors import (
    ConfigurationError,
    FeatherError,
    FeatherWarning,
    FileFormatError,
    NonFiniteWeightError,
    StateError,
)

if TYPE_CHECKING:
    from . import models
    from ._version import __version__
    from .attach import sparsify
    from .average import LatentAverage
    from .export import load_sparse, save_sparse
    from .finetune import FixedMask, keep_zeros
    from .info import engine_info
    from .measure import count_flops, recalibrate_batchnorm
    from .measure.report import report, sparsity
    from .methods import available_methods, register_method
    from .native import export_c, export_native, export_web
    from .operators import power_threshold
    from .runtime import compile_sparse, load_compiled, save_compiled
    from .sparsifier import Sparsifier

# Imported when first used, as modules are: the command line answers without PyTorch, and what is
# above the core is loaded only if it is needed. No name is that of a module, which would take its
# place.
_LAZY = {
    "FixedMask": ".finetune",
    "LatentAverage": ".average",
    "Sparsifier": ".sparsifier",
    "__version__": "._version",
    "available_methods": ".methods",
    "compile_sparse": ".runtime",
    "count_flops": ".measure",
    "engine_info": ".info",
    "export_c": ".native",
    "export_native": ".native",
    "export_web": ".native",
    "keep_zeros": ".finetune",
    "load_compiled": ".runtime",
    "load_sparse": ".export",
    "power_threshold": ".operators",
    "recalibrate_batchnorm": ".measure",
    "register_method": ".methods",
    "report": ".measure",
    "save_compiled": ".runtime",
    "save_sparse": ".export",
    "sparsify": ".attach",
    "sparsity": ".measure",
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
    "export_web",
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
        found = getattr(import_module(_LAZY[name], __name__), name)
        globals()[name] = found
        return found
    if name == "ZeroKeeper":
        warn_renamed("torch_feather.ZeroKeeper", "torch_feather.FixedMask")
        return __getattr__("FixedMask")
    if name.isidentifier() and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "models", "testing"})
