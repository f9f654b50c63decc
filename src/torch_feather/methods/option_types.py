"""Checks plain values of a method's options against the annotations of its factory."""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigurationError, shorten

LIMIT = 2**53  # larger integers are not exact as floats
NAMES = {
    type(None): "None",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def check_option_types(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise an error for option values whose type the factory does not accept.

    Only plain values are checked: None, booleans, numbers, text, lists and dictionaries, as they
    come from a settings file. Options without an annotation, and objects, are left to the factory.

    Args:
        name: name of the method, for the message.
        factory: the factory.
        options: the values by name.

    Raises:
        ConfigurationError: a value of another type, NaN, or an integer beyond 2^53.

    Example:
        >>> def factory(*, p: float = 3.0, end: int | None = None): ...
        >>> check_option_types("mine", factory, {"p": 2, "end": None})
        >>> try:
        ...     check_option_types("mine", factory, {"p": {"a": 1}})
        ... except ConfigurationError as error:
        ...     print(error)
        Option 'p' of method 'mine' must be a number, got {'a': 1}.
    """
    while isinstance(factory, functools.partial):
        factory = factory.func
    try:
        hints = typing.get_type_hints(factory)
    except Exception:  # names that exist only for type checkers; a class with its own __init__
        return
    for option, value in options.items():
        if option in hints and type(value) in NAMES:
            _check(f"Option {option!r} of method {name!r}", value, _plain_types(hints[option]))


def _check(what: str, value: Any, allowed: set[type] | None) -> None:
    if allowed is not None and not _accepts(allowed, value):
        expected = " or ".join(text for kind, text in NAMES.items() if kind in allowed)
        expected = expected or "an object, see the method's documentation"
        raise ConfigurationError(f"{what} must be {expected}, got {shorten(value)}.")
    if isinstance(value, float) and math.isnan(value):
        raise ConfigurationError(f"{what} must not be NaN.")
    integral = type(value) is int or (allowed is not None and float not in allowed)
    if integral and type(value) in (int, float) and abs(value) > LIMIT:
        raise ConfigurationError(f"{what} must be at most 2^53, got an integer beyond it.")


def _accepts(allowed: set[type], value: Any) -> bool:
    kind = type(value)
    if kind is float and float not in allowed:
        return int in allowed and value.is_integer()
    return kind in allowed or (kind is int and float in allowed)


def _plain_types(hint: Any) -> set[type] | None:
    """Return the plain types that an annotation allows; None if it may allow any."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [_plain_types(part) for part in typing.get_args(hint)]
        return None if None in parts else set().union(*(part or set() for part in parts))
    origin = typing.get_origin(hint) or hint
    if origin in NAMES:
        return {origin}
    if not isinstance(origin, type) or origin is object:
        return None
    if issubclass(origin, Mapping):
        return {dict}
    if issubclass(origin, Sequence):
        return {list}
    return set()
