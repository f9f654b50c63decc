"""Earlier spellings of benchmark options."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence


def current_options(argv: Sequence[str] | None, renamed: Mapping[str, str]) -> list[str]:
    """Replace earlier option names in a command line, with a `DeprecationWarning` for each.

    Args:
        argv: the command line; None for that of the process.
        renamed: earlier to current names, such as `{"--peer": "--reference"}`.

    Returns:
        The command line with current names.
    """
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        if name in renamed:
            message = f"{name} is deprecated; use {renamed[name]} instead."
            warnings.warn(message, DeprecationWarning, stacklevel=3)
            word = renamed[name] + equals + value
        words.append(word)
    return words
