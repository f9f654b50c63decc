"""The methods that can be asked for by name.

Most are a composition of four parts: what becomes of a weight (operator), how its gradient comes
back (gradient rule), which threshold it meets (allocation), and when (schedule). Others learn
their thresholds. A new one is one small file with a function that makes a `Method`, a
`LearnedMethod` or another object with `attach`, and one line in the table.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..errors import ConfigurationError, nearest
from .feather import feather
from .feather_flops import feather_flops
from .gmp import feather_gmp, gmp
from .learned.asl import asl
from .learned.asl_plus import asl_plus, feather_asl_plus
from .learned.str_ import str_
from .magnitude import AnyMethod, Method
from .probmask.probmask import probmask
from .spartan.spartan import spartan
from .st3 import st3, st3_sigma
from .ste import hard_ste, soft_ste

__all__ = ["AnyMethod", "Method", "available_methods", "build_method", "method_options"]

METHODS: dict[str, Callable[..., AnyMethod]] = {
    "feather": feather,
    "feather-gmp": feather_gmp,
    "feather-flops": feather_flops,
    "feather-asl+": feather_asl_plus,
    "hard-ste": hard_ste,
    "soft-ste": soft_ste,
    "gmp": gmp,
    "st3": st3,
    "st3-sigma": st3_sigma,
    "probmask": probmask,
    "spartan": spartan,
    "asl": asl,
    "asl+": asl_plus,
    "str": str_,
}


def available_methods() -> list[str]:
    """Names that `sparsify` and `feather train --method` take."""
    return list(METHODS)


def method_options(name: str) -> dict[str, Any]:
    """Options of a method and their defaults."""
    parameters = inspect.signature(_lookup(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "sparsity"}


def build_method(name: str, *, sparsity: float, **options: Any) -> AnyMethod:
    """The method called `name` for a final `sparsity`.

    Raises:
        ConfigurationError: an unknown name or option (the message names the nearest), or a value
            that the method refuses.
    """
    known = method_options(name)
    for option in options:
        if option not in known:
            raise ConfigurationError(
                f"Method {name!r} has no option {option!r}{nearest(option, known)} "
                f"It has: {', '.join(known)}."
            )
    return _lookup(name)(sparsity=sparsity, **options)


def _lookup(name: str) -> Callable[..., AnyMethod]:
    if name not in METHODS:
        raise ConfigurationError(
            f"There is no method {name!r}{nearest(name, METHODS)} There are: {', '.join(METHODS)}."
        )
    return METHODS[name]
