"""Errors of the export of native libraries."""

from __future__ import annotations

from ..errors import FeatherError


class NativeExportError(FeatherError):
    """The network has an operation that native libraries do not support, or a tool failed.

    Example:
        >>> issubclass(NativeExportError, FeatherError)
        True
    """
