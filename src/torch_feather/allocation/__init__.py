"""Allocations: how a target is divided among the layers.

Methods with a schedule take them as `allocation=`, by name or as an object. Methods that learn
their thresholds have a `ThresholdParametrization` instead.
"""

from .base import Allocation
from .erk import ERK
from .global_ import Global
from .scaled import FlopsBiased, Sigma
from .uniform import Uniform

__all__ = ["ERK", "Allocation", "FlopsBiased", "Global", "Sigma", "Uniform"]
