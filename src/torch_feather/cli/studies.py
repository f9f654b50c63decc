"""`feather study`, whose commands are imported only if they are used."""

from __future__ import annotations

from typing import Any

import typer

from .groups import Commands


class Studies(Commands):
    """The commands of `feather study`, imported on first use.

    Example:
        >>> group = Studies(name="study")
        >>> group.list_commands(None)[:3]
        ['recipe', 'threshold', 'stability']
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self._load())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._load().get(cmd_name)

    def _load(self) -> dict[str, Any]:
        from ..studies.command import app

        group: Any = typer.main.get_command(app)
        return group.commands


studies = typer.Typer(
    cls=Studies,
    no_args_is_help=True,
    help="Reproduce the tables and figures of the paper's supplement.",
)
