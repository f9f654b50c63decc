"""Which threshold for which tensor: how a target is shared among the layers."""

from .base import Allocation
from .erk import ERK
from .global_ import Global
from .scaled import FlopsBiased, Sigma
from .uniform import Uniform

__all__ = ["ERK", "Allocation", "FlopsBiased", "Global", "Sigma", "Uniform"]
