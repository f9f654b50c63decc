"""The terminal that shows a progress bar."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def control_characters_shown(descriptor: int | None, shown: bool) -> bool | None:
    """Set whether a terminal shows control characters that are typed, such as `^C`.

    `^C` behind a bar of the full width begins a new line, so that the bar would be shown twice.

    Args:
        descriptor: file descriptor of the terminal; None is the standard input.
        shown: whether to show them.

    Returns:
        Whether they were shown before; None if it is no terminal, or one without this setting.

    Example:
        >>> read, write = os.pipe()
        >>> control_characters_shown(read, False) is None  # no terminal
        True
    """
    try:
        import termios
    except ImportError:  # on Windows
        return None
    with suppress(termios.error, ValueError, OSError, AttributeError):
        found = sys.stdin.fileno() if descriptor is None else descriptor
        modes = termios.tcgetattr(found)
        # Only the foreground process may change its terminal; others would be stopped.
        if os.tcgetpgrp(found) != os.getpgrp():
            return None
        before = bool(modes[3] & termios.ECHOCTL)
        modes[3] = modes[3] | termios.ECHOCTL if shown else modes[3] & ~termios.ECHOCTL
        termios.tcsetattr(found, termios.TCSANOW, modes)
        return before
    return None
