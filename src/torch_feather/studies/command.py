"""The command `feather study NAME`, with the same options for every study."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .descriptions import DESCRIPTIONS, Description

app = typer.Typer(rich_markup_mode="markdown")  # "rich" would hide text in brackets


def command(study: Description) -> Callable[..., None]:
    """Return the command line function of a study.

    Its parameters are those of `run_study` that apply to the study, declared for Typer.

    Args:
        study: the description of the study. The study itself is imported when it runs.

    Example:
        >>> run = command(DESCRIPTIONS["compare"])
        >>> list(inspect.signature(run).parameters)[:3]
        ['methods', 'sparsity', 'seeds']
        >>> run.__doc__.splitlines()[0]  # the help text
        'Which method trains the most accurate sparse network with the same training budget?'
    """

    def run(**given: Any) -> None:
        from . import STUDIES
        from .execute import run_study

        run_study(STUDIES[study.name], **given)

    run.__doc__ = (
        f"{study.question}\n\n{study.background}\n\n{study.source}. Finished runs are not trained "
        "again and interrupted runs resume: run the command again at any time."
    )
    run.__signature__ = inspect.Signature(_parameters(study))  # type: ignore[attr-defined]
    return run


def _parameters(study: Description) -> list[inspect.Parameter]:
    def option(name: str, kind: Any, default: Any, *flags: str, **details: Any) -> None:
        annotation = Annotated[kind, typer.Option(*flags, **details)]
        found.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
        )

    found: list[inspect.Parameter] = []
    text, path = str | None, Path | None
    if study.methods:
        help = (
            "Comma-separated method names, `package.module:factory`, or `all`. `dense` is the "
            "dense network; `feather:p=2:theta=1` sets options of one method. "
            f"[default: {study.methods}]"
        )
        option("methods", text, None, help=help)
    help = f"Target sparsities. [default: {study.sparsities}; digits: {study.digits_sparsities}]"
    option("sparsity", text, None, help=help)
    option("seeds", str, "0,1,2", help="Random seeds; one run each.")
    help = "Recipe, see `feather recipes`. [default: the recipe of --data, otherwise digits]"
    option("recipe", text, None, help=help)
    option("data", text, None, help="digits, cifar10, cifar100 or imagefolder.")
    option("data_path", text, None, help="Folder of the data.")
    help = "Override any key of config.yaml."
    option("settings", list[str] | None, None, "--set", metavar="KEY=VALUE", help=help)
    help = (
        "Concurrent training runs; with --ray, runs that share a GPU. "
        "[default: 1; digits: 2 if there are as many cores]"
    )
    option("jobs", int | None, None, min=1, help=help)
    help = "Ray cluster; `local` starts Ray on this machine."
    option("ray", text, None, metavar="ADDRESS", help=help)
    help = "Do not start new runs after this many minutes; 0 only reports completed runs."
    option("minutes", float | None, None, min=0, help=help)
    help = f"Folder of page, tables, figures and rows. [default: runs/{study.name}-RECIPE]"
    option("out", path, None, help=help)
    help = "Folder of run directories; studies can share it. [default: runs in --out]"
    option("runs", path, None, help=help)
    if not study.measured:  # measuring a network needs its run directory
        help = "Rows of earlier studies; runs in them are not trained again."
        option("rows", list[Path] | None, None, metavar="runs.json", help=help)
    return found


for _description in DESCRIPTIONS.values():
    app.command(_description.name)(command(_description))
