"""Methods that learn one threshold per weight tensor."""

from .asl import asl
from .asl_plus import asl_plus, feather_asl_plus
from .base import LearnedMethod, ThresholdParametrization
from .str_ import str_

__all__ = [
    "LearnedMethod",
    "ThresholdParametrization",
    "asl",
    "asl_plus",
    "feather_asl_plus",
    "str_",
]
