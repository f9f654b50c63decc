"""Old names that keep working for one release, with a `DeprecationWarning`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that `old` is deprecated and that `new` replaces it.

    Args:
        old: the deprecated name.
        new: the name to use instead.
        stacklevel: which line the warning points at, as for `warnings.warn`; the default is the
            caller of the function that calls `warn_renamed`.

    Example:
        >>> def old_name():
        ...     warn_renamed("old_name", "new_name")
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     old_name()
        >>> print(caught[0].message)
        old_name is deprecated. Use new_name.
    """
    message = f"{old} is deprecated. Use {new}."
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def renamed_argument(function: str, old: str, given: Any, new: str, value: Any) -> Any:
    """Return the value of an argument of `function`, also if it was given by its old name.

    Args:
        function: name of the function that calls `renamed_argument`.
        old: the deprecated name.
        given: the value by that name; None if it was not given.
        new: the name to use instead.
        value: the value by that name.

    Example:
        >>> renamed_argument("train", "watch", None, "callback", "mine")
        'mine'
    """
    if given is None:
        return value
    warn_renamed(f"{function}({old}=...)", f"{function}({new}=...)", stacklevel=4)
    return given


def renamed_names(
    module: str, names: Mapping[str, str], target: str | None = None
) -> Callable[[str], Any]:
    """Return a `__getattr__` for `module` that resolves old names.

    Args:
        module: the module's `__name__`.
        names: old name to new name.
        target: the module of the new names; None is `module` itself.

    Example:
        >>> __getattr__ = renamed_names("math", {"square_root": "sqrt"})
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     __getattr__("square_root")(9)
        3.0
        >>> print(caught[0].message)
        math.square_root is deprecated. Use math.sqrt.
    """

    new_module = target or module

    def resolve(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", f"{new_module}.{names[name]}")
        return getattr(import_module(new_module), names[name])

    return resolve


def renamed_fields(**names: str) -> Callable[[C], C]:
    """Let a dataclass accept and return its fields by their old names too.

    Args:
        names: old field name to new field name.

    Example:
        >>> from dataclasses import dataclass
        >>> @renamed_fields(colour="color")
        ... @dataclass(frozen=True)
        ... class Pen:
        ...     color: str = "black"
        >>> with warnings.catch_warnings(record=True):
        ...     warnings.simplefilter("always")
        ...     Pen(colour="red"), Pen().colour
        (Pen(color='red'), 'black')
    """

    def decorate(cls: C) -> C:
        init = vars(cls)["__init__"]

        @functools.wraps(init)
        def accept(self: Any, *values: Any, **given: Any) -> None:
            for old, new in names.items():
                if old in given:
                    warn_renamed(f"{cls.__name__}({old}=...)", f"{cls.__name__}({new}=...)")
                    given[new] = given.pop(old)
            init(self, *values, **given)

        def resolve(self: Any, name: str) -> Any:
            if name not in names:
                raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")
            warn_renamed(f"{cls.__name__}.{name}", f"{cls.__name__}.{names[name]}")
            return getattr(self, names[name])

        cls.__init__ = accept  # type: ignore[misc]
        cls.__getattr__ = resolve  # type: ignore[attr-defined]
        return cls

    return decorate
