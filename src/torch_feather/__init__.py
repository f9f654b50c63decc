"""Sparse training for PyTorch: two lines in any training loop.

import torch_feather as feather

sparsifier = feather.sparsify(model, optimizer, sparsity=0.95, total_steps=steps)
...  # the training loop, unchanged
sparsifier.finalize()
"""

from importlib.metadata import PackageNotFoundError, version

from . import models
from .average import LatentAverage
from .errors import (
    ConfigurationError,
    FeatherError,
    FeatherWarning,
    FileFormatError,
    NonFiniteWeightError,
    StateError,
)
from .export import load_sparse, save_sparse
from .finetune import ZeroKeeper, keep_zeros
from .measure.batchnorm import recalibrate_batchnorm
from .measure.flops import count_flops
from .measure.report import report, sparsity
from .methods import available_methods
from .operators import power_threshold
from .runtime import compile_sparse
from .sparsifier import Sparsifier, sparsify

try:
    __version__ = version("torch-feather")
except PackageNotFoundError:  # used from a source folder without being installed
    __version__ = "unknown"

__all__ = [
    "ConfigurationError",
    "FeatherError",
    "FeatherWarning",
    "FileFormatError",
    "LatentAverage",
    "NonFiniteWeightError",
    "Sparsifier",
    "StateError",
    "ZeroKeeper",
    "__version__",
    "available_methods",
    "compile_sparse",
    "count_flops",
    "keep_zeros",
    "load_sparse",
    "models",
    "power_threshold",
    "recalibrate_batchnorm",
    "report",
    "save_sparse",
    "sparsify",
    "sparsity",
]
