"""The terminal that the commands print to."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


def make_console() -> Any:
    """Return a rich console; 120 columns wide if the output is not a terminal.

    Example:
        >>> make_console().print("[bold]95%[/bold] of the weights are zero")
        95% of the weights are zero
    """
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def print_json(values: Mapping[str, Any]) -> None:
    """Print values as JSON on the standard output, one key per line.

    Args:
        values: plain values by name.

    Example:
        >>> print_json({"accuracy": 0.5})
        {
          "accuracy": 0.5
        }
    """
    print(json.dumps(values, indent=2))
