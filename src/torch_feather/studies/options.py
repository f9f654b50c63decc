"""Names of method options, in this version and in version 0.1."""

from __future__ import annotations

from typing import Any

from ..methods import current_options, method_options
from ..training.config import DENSE

# Present names of options whose spelling in run names is that of version 0.1, so that earlier runs
# are found and `options.lr` does not collide with `optimizer.lr`.
_IN_RUN_NAMES = {"lr_multiplier": "rate", "lr": "rate"}


def options_of(method: str) -> dict[str, Any]:
    """Return the options of a method with their defaults; the dense network has none.

    Args:
        method: name of a method, `package.module:factory`, or `dense`.

    Example:
        >>> options_of("feather")["p"]
        3.0
        >>> options_of("dense")
        {}
    """
    return {} if method == DENSE else method_options(method)


def current_option(method: str, option: str) -> str:
    """Return the present name of a method's option.

    Args:
        method: name of the method, or `dense`.
        option: its present name or its name in version 0.1.

    Returns:
        The present name; an unknown name as it is.

    Example:
        >>> current_option("probmask", "rate"), current_option("probmask", "passes")
        ('lr', 'passes')
    """
    return next(iter(current_options(method, {option: None})))


def name_in_run_names(option: str) -> str:
    """Return the spelling of an option in run names, which is that of version 0.1.

    Args:
        option: present name of the option.

    Example:
        >>> name_in_run_names("lr_multiplier"), name_in_run_names("p")
        ('rate', 'p')
    """
    return _IN_RUN_NAMES.get(option, option)
