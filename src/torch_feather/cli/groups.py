"""Groups of commands that answer without loading what only other calls need."""

from __future__ import annotations

from typing import Any

import typer


class Commands(typer.core.TyperGroup):
    """A group whose own options are flags, such as --version.

    Typer loads Pydantic, which takes longer than all else, to convert a flag that is None.

    Example:
        >>> Commands(name="feather").list_commands(None)
        []
    """

    def get_params(self, ctx: Any) -> Any:
        """Return the options, all of which are false by default."""
        options = super().get_params(ctx)
        for option in options:
            option.default = False
        return options
