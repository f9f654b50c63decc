"""Names of method options, in this version and in version 0.1."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..methods import method_options
from ..training.config import DENSE

# Name in version 0.1: names since. Run names keep the old one, so that earlier runs are found and
# `options.lr` does not collide with `optimizer.lr`.
RENAMED = {"rate": ("lr_multiplier", "lr")}


def options_of(method: str) -> dict[str, Any]:
    """Return the options of a method with their defaults; the dense network has none.

    Example:
        >>> options_of("feather")["p"]
        3.0
        >>> options_of("dense")
        {}
    """
    return {} if method == DENSE else method_options(method)


def current_option(method: str, option: str) -> str:
    """Return the name of a method's option in this version.

    Args:
        method: name of the method, or `dense`.
        option: name in this version or in version 0.1.

    Returns:
        The name in this version; an unknown name as it is.
    """
    return renamed_option(option, options_of(method))


def renamed_option(option: str, known: Collection[str]) -> str:
    """Return the name in `known` of an option that may be spelled as in version 0.1.

    Example:
        >>> renamed_option("rate", ["lr", "passes"])
        'lr'
        >>> renamed_option("passes", ["lr", "passes"])
        'passes'
    """
    if option in known:
        return option
    return next((name for name in RENAMED.get(option, ()) if name in known), option)


def name_in_run_names(option: str) -> str:
    """Return the spelling of an option in run names, which is that of version 0.1.

    Example:
        >>> name_in_run_names("lr_multiplier")
        'rate'
    """
    return next((old for old, names in RENAMED.items() if option in names), option)
