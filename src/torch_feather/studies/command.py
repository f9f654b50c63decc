"""The command `feather study NAME`, with the same options for every study."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigurationError
from ..methods import available_methods
from ..training import Config, resolve_config
from ..training.config import DENSE, apply, default_recipe, parse_assignments
from ..training.distributed import Ranks
from ..training.errors import RunError
from ..training.loop import chosen
from . import STUDIES
from .output import RunFacts, write_study
from .runner import Outcome, train_all
from .runs import read_rows
from .study import GridAxes, Study

app = typer.Typer(rich_markup_mode="markdown")  # "rich" would hide text in brackets


def command(study: Study) -> Callable[..., None]:
    """Return the command line function of a study.

    Its parameters are those of `_run_study` that apply to the study, declared for Typer.

    Args:
        study: the study.

    Example:
        >>> run = command(STUDIES["compare"])
        >>> list(inspect.signature(run).parameters)[:3]
        ['methods', 'sparsity', 'seeds']
        >>> run.__doc__.splitlines()[0]  # the help text
        'Which method trains the most accurate sparse network with the same training budget?'
    """

    def run(**given: Any) -> None:
        _run_study(study, **given)

    run.__doc__ = (
        f"{study.question}\n\n{study.background}\n\n{study.source}. Finished runs are not trained "
        "again and interrupted runs resume: run the command again at any time."
    )
    run.__signature__ = inspect.Signature(_parameters(study))  # type: ignore[attr-defined]
    return run


def _parameters(study: Study) -> list[inspect.Parameter]:
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
    if study.measure is None:  # measuring a network needs its run directory
        help = "Rows of earlier studies; runs in them are not trained again."
        option("rows", list[Path] | None, None, metavar="runs.json", help=help)
    return found


def _run_study(
    study: Study,
    *,
    methods: str | None = None,
    sparsity: str | None = None,
    seeds: str = "0,1,2",
    recipe: str | None = None,
    data: str | None = None,
    data_path: str | None = None,
    settings: list[str] | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    minutes: float | None = None,
    out: Path | None = None,
    runs: Path | None = None,
    rows: list[Path] | None = None,
) -> None:
    """Train the missing runs of a study and write its page.

    The parameters are the options of the command line, see `feather study NAME --help`.

    Raises:
        ConfigurationError: settings, data or methods that do not exist or do not fit the study.
        RunError: the output folder or a file of rows cannot be used.
        SystemExit: runs failed; the page was written from the others.
    """
    config = base_config(study, recipe, data, data_path, settings or [])
    on_digits = config.data.name == "digits"
    sparsity = sparsity or (study.digits_sparsities if on_digits else study.sparsities)
    methods = methods or study.methods
    axes = GridAxes(
        _parse_list("sparsity", sparsity, float),
        _parse_list("seeds", seeds, int),
        [DENSE, *available_methods()] if methods == "all" else (methods or "").split(","),
    )
    plan = study.plan(config, axes)
    out = _output_folder(out or Path("runs") / f"{study.name}-{config.recipe}")
    if data_path is not None and not Path(config.data.path or "").exists():
        raise ConfigurationError(f"--data-path {data_path}: no such file or folder")
    if jobs is None:
        jobs = min(2, os.cpu_count() or 1) if on_digits else 1
    folder = runs or out / "runs"
    known = [row for file in rows or [] for row in read_rows(file)]
    limits: dict[str, Any] = {"jobs": jobs, "minutes": minutes, "ray": ray}
    outcome = train_all(plan, folder, **limits, known=known, on_end=_print_progress(len(plan)))
    found = list(outcome.rows.values())
    if study.measure:  # after all training, so that no other computation disturbs it
        for i, row in enumerate(found):
            found[i] = row | study.measure(row, folder / row["name"], out, config.data.path)
    if found or not plan:
        given = {"methods": methods, "recipe": config.recipe, "data": data, "sparsity": sparsity}
        given |= {"seeds": seeds, "data-path": "DATA" if data_path else None}
        facts = RunFacts(_command_line(study, given if plan else {}, settings or []), len(plan))
        typer.echo(write_study(study, study.answer(found, config), found, out, facts))
        typer.echo(out / "index.html")
    if outcome.pending:
        typer.echo(f"{len(outcome.pending)} runs are pending; run the same command again.")
    if outcome.failed:
        raise SystemExit(1)


def base_config(
    study: Study,
    recipe: str | None,
    data: str | None,
    data_path: str | None,
    settings: Sequence[str],
) -> Config:
    """Return the common configuration of a study's runs; the command line takes precedence.

    Args:
        study: the study.
        recipe: name of a recipe; None for the recipe of `data`.
        data: name of a data set; None for the recipe's.
        data_path: folder of the data.
        settings: assignments of `--set`, such as `epochs=5`.

    Raises:
        ConfigurationError: a setting that does not exist, or one that the study or another option
            determines.

    Example:
        >>> base_config(STUDIES["compare"], None, "digits", None, []).epochs
        10
        >>> base_config(STUDIES["compare"], None, "digits", None, ["epochs=5"]).epochs
        5
    """
    given: dict[str, Any] = parse_assignments(list(settings))
    if data is not None:
        given["data.name"] = data
    if data_path is not None:
        given["data.path"] = str(Path(data_path).expanduser().absolute())
    elsewhere = {"sparsity": "--sparsity", "seed": "--seeds"}
    elsewhere |= {"method": "--methods" if study.methods else "the study"}
    for key in {key for key in given if key in elsewhere or key in study.fixed_settings}:
        raise ConfigurationError(
            f"--set {key}=... is not supported: {elsewhere.get(key, 'the study')} determines "
            f"{key} of all runs. Leave it out."
        )
    # The studies are the paper's: its recipe, also for folders of images.
    usual = "imagenet" if data == "imagefolder" else default_recipe(data)
    config = resolve_config(recipe or usual)
    if given.get("data.name", config.data.name) == "digits":
        config = apply(config, study.digits_settings, f"study {study.name}")
    return chosen(apply(config, given, "command line"), Ranks())


def _parse_list(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--{option} {text!r}: separate values by commas") from None


def _output_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {path}: cannot be created ({error.strerror})") from None
    return path


def _command_line(study: Study, given: dict[str, str | None], settings: Sequence[str]) -> str:
    """Return the command that repeats a study, without paths of this machine."""
    words = [word for key, value in given.items() if value for word in (f"--{key}", value)]
    words += [word for setting in settings if given for word in ("--set", setting)]
    return shlex.join(["feather", "study", study.name, *words])


def _print_progress(planned: int) -> Callable[[str, Outcome], None]:
    def on_end(name: str, outcome: Outcome) -> None:
        line = f"{len(outcome.rows) + len(outcome.failed)}/{planned} {name}"
        if name in outcome.failed:
            typer.echo(f"{line}: {outcome.failed[name]}", err=True)
        else:
            typer.echo(f"{line}: {100 * outcome.rows[name]['test_accuracy']:.2f}%")

    return on_end


for _study in STUDIES.values():
    app.command(_study.name)(command(_study))
