"""The operations of PyTorch that programs support, besides sparse layers and views.

Each function adds an operation to a program. Its arguments are those of the operation; tensors are
`View`s, or constants of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .elementwise import ELEMENTWISE
from .reductions import REDUCTIONS
from .resampling import RESAMPLINGS
from .shapes import SHAPES

SUPPORTED: dict[Any, Callable[..., Any]] = {**ELEMENTWISE, **REDUCTIONS, **RESAMPLINGS, **SHAPES}
