"""Errors of the CPU runtime."""

from __future__ import annotations

from ..errors import FeatherError


class CaptureError(FeatherError):
    """The model cannot be captured as a graph.

    Example:
        >>> issubclass(CaptureError, FeatherError)
        True
    """


class InputError(FeatherError, ValueError):
    """A model, option or input that the compiled network does not support.

    Example:
        >>> issubclass(InputError, ValueError)
        True
    """


class RuntimeMissingError(FeatherError, ImportError):
    """The package that generates machine code is not installed.

    Example:
        >>> issubclass(RuntimeMissingError, ImportError)
        True
    """
