"""Checks of settings, with one form of messages."""

from __future__ import annotations

import math

from ...errors import ConfigurationError, nearest, shorten


def require(condition: object, message: str) -> None:
    """Raise an error unless a condition holds.

    Args:
        condition: the condition.
        message: the message of the error.

    Raises:
        ConfigurationError: it does not.

    Example:
        >>> require(1 < 2, "one must be below two")
    """
    if not condition:
        raise ConfigurationError(message)


def choice(key: str, value: str, known: tuple[str, ...], others: str = "") -> None:
    """Check a name.

    Args:
        key: the setting, for the message.
        value: its value.
        known: the names that are allowed.
        others: other allowed forms, for the message.

    Raises:
        ConfigurationError: the message names the nearest name.

    Example:
        >>> try:
        ...     choice("optimizer.schedule", "cosin", ("cosine", "step"))
        ... except ConfigurationError as error:
        ...     print(error)
        optimizer.schedule: 'cosin' is not one of cosine, step; did you mean 'cosine'?
    """
    if value not in known:
        listed = ", ".join([*known, *([others] if others else [])])
        hint = nearest(value, known).rstrip(".")
        raise ConfigurationError(f"{key}: {value!r} is not one of {listed}{hint}")


def within(key: str, value: float | None, least: float, most: float) -> None:
    """Check a number that may be None; larger values overflow, or cannot be meant.

    Args:
        key: the setting, for the message.
        value: its value.
        least: smallest allowed value.
        most: largest allowed value.

    Raises:
        ConfigurationError: the number is out of range.

    Example:
        >>> within("epochs", 3, 1, 10)
    """
    if value is None:
        return
    require(value >= least, f"{key} must be at least {least}, got {shorten(value)}")
    require(value <= most, f"{key} must be at most {most:,}, got {shorten(value)}")


def finite(key: str, value: float | None) -> None:
    """Check that a number, which may be None, is finite.

    Args:
        key: the setting, for the message.
        value: its value.

    Raises:
        ConfigurationError: it is infinite or NaN.

    Example:
        >>> finite("optimizer.lr", 0.1)
    """
    require(value is None or math.isfinite(value), f"{key} must be finite, got {value}")
