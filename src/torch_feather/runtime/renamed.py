"""Names of version 0.1: they work, with a warning."""

from __future__ import annotations

import warnings
from typing import Any


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that a name is deprecated.

    Args:
        old: the name.
        new: what to use instead.
        stacklevel: see `warnings.warn`.

    Example:
        >>> with warnings.catch_warnings(record=True) as found:
        ...     warnings.simplefilter("always")
        ...     warn_renamed("choices", "tuning")
        >>> str(found[0].message).partition(".")[0]
        'choices is deprecated and will be removed in the next release'
    """
    message = f"{old} is deprecated and will be removed in the next release. Use {new}."
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def renamed(old: str, old_value: Any, new: str, value: Any) -> Any:
    """Return the value of an argument of `compile_sparse`, also if it has its old name.

    Example:
        >>> renamed("choices", None, "tuning", {})
        {}
    """
    if old_value is None:
        return value
    warn_renamed(f"compile_sparse({old}=)", f"{new}=", stacklevel=4)
    return old_value
