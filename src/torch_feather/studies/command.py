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
    option("seeds", str, study.seeds, help="Random seeds; one run each.")
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
    if study.timed_on_request:
        help = "After training, time the networks that have no timings yet, on an idle machine."
        option("time", bool, False, "--time", help=help)
    if not study.measured:  # measuring a network needs its run directory
        help = "Rows of earlier studies; runs in them are not trained again."
        option("rows", list[Path] | None, None, metavar="runs.json", help=help)
    return found


for _description in DESCRIPTIONS.values():
    app.command(_description.name)(command(_description))


@app.command()
def power(
    files: Annotated[list[Path], typer.Argument(metavar="runs.json...", help="Rows of studies.")],
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--pair",
            metavar="'FIRST vs. SECOND'",
            help="A comparison, as in the tables of a study. "
            "[default: the first sparse method with each of the others]",
        ),
    ] = None,
) -> None:
    """How many seeds does a comparison require?

    Estimates from the spread of recorded runs how many seeds a paired comparison requires for a
    power of 80% at a two-sided level of 5%: for the difference seen, and for 0.5 points. Trains
    nothing, and prints a table in Markdown.
    \f

    Example:
        >>> import tempfile
        >>> from ..errors import FeatherError
        >>> try:
        ...     power([Path(tempfile.mkdtemp()) / "runs.json"])
        ... except FeatherError as error:
        ...     print(error)
        /...runs.json: no such file
    """
    from .output import markdown_table
    from .power import pairs_of, power_table
    from .runs import read_rows

    rows = [row for file in files for row in read_rows(file)]
    typer.echo(markdown_table(power_table(rows, pairs_of(rows, pairs or []))))
