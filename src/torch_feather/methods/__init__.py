"""The methods of sparse training, and the contract for a method of your own.

`Method` composes most methods of four parts, and an optional fifth:

    operator        the effective value of a kept weight
    gradient rule   how the gradient reaches the latent weights
    allocation      how the target is divided among the layers
    schedule        the sparsity over time
    latent update   how the latent weights change after each step; optional

Other methods subclass `BoundMethod`.
"""

from .base import AnyMethod, BoundMethod, Completion, Facts, Summary
from .feather import feather
from .feather_flops import feather_flops
from .feather_ham import feather_ham
from .gmp import feather_gmp, gmp
from .learned import LearnedMethod, asl, asl_plus, feather_asl_plus, str_
from .magnitude import MagnitudePruning, Method
from .patterned import PatternedMethod
from .probmask import probmask
from .registry import (
    METHODS,
    RENAMED_OPTIONS,
    available_methods,
    build_method,
    current_options,
    describe_method,
    find_method,
    method_options,
    register_method,
    unused_options,
)
from .spartan import spartan
from .st3 import st3, st3_sigma
from .ste import hard_ste, soft_ste

__all__ = [
    "METHODS",
    "RENAMED_OPTIONS",
    "AnyMethod",
    "BoundMethod",
    "Completion",
    "Facts",
    "LearnedMethod",
    "MagnitudePruning",
    "Method",
    "PatternedMethod",
    "Summary",
    "asl",
    "asl_plus",
    "available_methods",
    "build_method",
    "current_options",
    "describe_method",
    "feather",
    "feather_asl_plus",
    "feather_flops",
    "feather_gmp",
    "feather_ham",
    "find_method",
    "gmp",
    "hard_ste",
    "method_options",
    "probmask",
    "register_method",
    "soft_ste",
    "spartan",
    "st3",
    "st3_sigma",
    "str_",
    "unused_options",
]
