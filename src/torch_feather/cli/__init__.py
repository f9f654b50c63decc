"""The command `feather`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

from ..errors import install_hint

try:
    import rich  # noqa: F401
    import typer
    import yaml  # noqa: F401
except ImportError as error:
    raise SystemExit(
        f"feather: the command line needs {error.name}. {install_hint('train')}"
    ) from None

from .demo import demo
from .example import example
from .files import bench, export
from .groups import Commands
from .lists import methods, recipes
from .predict import predict
from .runs import evaluate, report
from .settings import SettingsCommand, misplaced_option, with_settings
from .studies import studies
from .training import EXAMPLES, train
from .tune import tune

__all__ = [
    "bench",
    "demo",
    "evaluate",
    "example",
    "export",
    "main",
    "make_app",
    "methods",
    "predict",
    "recipes",
    "report",
    "train",
    "tune",
]


def _show_version(requested: bool) -> None:
    if requested:
        from .. import __version__

        typer.echo(f"torch-feather {__version__}")
        raise typer.Exit


def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Sparse training for PyTorch: train networks in which 90% to 99.5% of the weights are zero.

    Start with `feather train`. It takes a minute and downloads nothing.
    """
    from ..errors import name_command_line_options

    name_command_line_options(True, assignments=context.invoked_subcommand in ("study", "tune"))
    context.call_on_close(lambda: name_command_line_options(False))


def make_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """Return the command line.

    Args:
        arguments: what it will be called with. They name the options of a method, and the recipe
            whose values `feather train --help` shows.

    Example:
        >>> len(make_app().registered_commands) > 8
        True
    """
    made = typer.Typer(
        name="feather",
        cls=Commands,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )
    made.callback()(_options)
    # --batch_size as in config.yaml, and --batch-size
    names = {"token_normalize_func": lambda name: name.replace("_", "-")}
    # Options cost time. Only those of the command that is called are made; a shell completes all.
    called = next(iter(arguments), None)
    others = (tune, predict, demo, evaluate, report, export, bench, methods, recipes, example)
    known = {"train", "study", *(other.__name__ for other in others)}
    all_of_them = called not in known or "_FEATHER_COMPLETE" in os.environ
    if all_of_them or called == "train":
        complete = called in (None, "train") or "_FEATHER_COMPLETE" in os.environ
        command = with_settings(train, arguments, complete=complete)
        made.command(cls=SettingsCommand, epilog=EXAMPLES, context_settings=names)(command)
    if all_of_them or called == "study":
        made.add_typer(studies, name="study")
    for other in others:
        if all_of_them or called == other.__name__:
            made.command()(other)
    return made


def main() -> None:
    """Run the command line. Errors that the user can correct are printed in one line.

    `FEATHER_TRACEBACK=1` shows the traceback instead.

    Raises:
        SystemExit: always, with 0 for success, 130 after an interrupt, otherwise 1 or 2.

    Example:
        >>> from contextlib import redirect_stderr
        >>> from unittest import mock
        >>> command = mock.patch.object(sys, "argv", ["feather", "report", "runs/absent"])
        >>> with command, redirect_stderr(sys.stdout):
        ...     try:
        ...         main()
        ...     except SystemExit as stop:
        ...         print("exit code", stop.code)
        feather: runs/absent: ...
        exit code 1
    """
    from ..errors import FeatherError
    from ..training.errors import Interrupted

    # A method of the user, --method module:factory, may be a file in the current folder.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # Python hides these by default; they concern options and files of the user.
            warnings.filterwarnings("default", category=DeprecationWarning, module="torch_feather")
            problem = misplaced_option(sys.argv[1:])
            if problem is not None:
                _fail(problem, 2)
            make_app(sys.argv[1:])()
    except Interrupted as error:
        _fail(str(error), 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except (FeatherError, OSError, ValueError, ImportError) as error:
        if os.environ.get("FEATHER_TRACEBACK"):
            raise
        _fail(str(error) or type(error).__name__, 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # of PyTorch, which may not be imported
            raise
        _fail("GPU out of memory. Try a smaller --batch-size, or --system.amp true.", 1)


def _show_warning(message: Warning | str, *details: object, **more: object) -> None:
    print(f"feather: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    prefix = "feather" if rank == "0" else f"feather, rank {rank}"
    print(f"{prefix}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
