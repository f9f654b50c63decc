"""`feather study NAME`: the same options for every study, made in one place."""

import inspect
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigurationError
from ..methods import available_methods
from ..training.config import (
    DENSE,
    Config,
    apply,
    default_recipe,
    parse_assignments,
    resolve_config,
)
from ..training.errors import RunError
from . import STUDIES
from .files import Made, read_rows, write
from .grid import Outcome, train_all
from .study import Choices, Study

app = typer.Typer()


def command(study: Study) -> Callable[..., None]:
    """The command line of one study."""

    def run(
        methods: Annotated[
            str | None,
            typer.Option(
                help="Names with commas between them, or `all`; `dense` is one, "
                "`feather:p=2:theta=1` has options of its own. "
                f"[default: {study.methods}]"
            ),
        ] = None,
        sparsity: Annotated[
            str | None,
            typer.Option(
                help=f"Shares of zeros. [default: {study.sparsities}; "
                f"on the digits {study.small_sparsities}]"
            ),
        ] = None,
        seeds: Annotated[str, typer.Option(help="A run of each for every seed.")] = "0,1,2",
        recipe: Annotated[
            str | None,
            typer.Option(
                help="The budget, see `feather recipes`. [default: that of --data, else digits]"
            ),
        ] = None,
        data: Annotated[
            str | None, typer.Option(help="digits, cifar10, cifar100 or imagefolder.")
        ] = None,
        data_path: Annotated[str | None, typer.Option(help="Folder of the data.")] = None,
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="KEY=VALUE", help="Any key of config.yaml."),
        ] = None,
        jobs: Annotated[
            int | None,
            typer.Option(
                min=1,
                help="Trainings at a time; with --ray, those that share a GPU. [default: 1; on the "
                "digits 2, where there are as many cores]",
            ),
        ] = None,
        ray: Annotated[
            str | None,
            typer.Option(
                metavar="ADDRESS", help="Of a Ray cluster; or `local`, to start one here."
            ),
        ] = None,
        minutes: Annotated[
            float | None,
            typer.Option(min=0, help="Start no training after that; 0 shows what is done so far."),
        ] = None,
        out: Annotated[
            Path | None,
            typer.Option(help=f"Page, table, figures, rows. [default: runs/{study.name}-RECIPE]"),
        ] = None,
        runs: Annotated[
            Path | None,
            typer.Option(help="Run directories, shared by studies. [default: runs in --out]"),
        ] = None,
        rows: Annotated[
            list[Path] | None,
            typer.Option(
                metavar="runs.json", help="Of other studies: what is in it is not trained again."
            ),
        ] = None,
    ) -> None:
        config = base(study, recipe, data, data_path, settings or [])
        sparsity = sparsity or (
            study.small_sparsities if config.data.name == "digits" else study.sparsities
        )
        methods = methods or study.methods
        choices = Choices(
            _listed("sparsity", sparsity, float),
            _listed("seeds", seeds, int),
            [DENSE, *available_methods()] if methods == "all" else (methods or "").split(","),
        )
        told = {"methods": methods, "recipe": config.recipe, "data": data, "sparsity": sparsity}
        told |= {"seeds": seeds, "data-path": "DATA" if data_path else None}
        words = [word for key, value in told.items() if value for word in (f"--{key}", value)]
        words += [word for setting in settings or [] for word in ("--set", setting)]
        plan = study.plan(config, choices)
        if not plan:
            words = []
        made = Made(shlex.join(["feather", "study", study.name, *words]), len(plan))
        out = out or Path("runs") / f"{study.name}-{config.recipe}"
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--out {out}: cannot be a folder ({error.strerror})") from None
        if data_path is not None and not Path(config.data.path or "").exists():
            raise ConfigurationError(f"--data-path {data_path}: there is no such file or folder")
        if jobs is None:
            jobs = min(2, os.cpu_count() or 1) if config.data.name == "digits" else 1
        folder, done = runs or out / "runs", _progress(len(plan))
        known = [row for file in rows or [] for row in read_rows(file)]
        outcome = train_all(
            plan, folder, jobs=jobs, minutes=minutes, ray=ray, known=known, done=done
        )
        found = list(outcome.rows.values())
        if study.measure:  # after all training, so that nothing else computes
            for i, row in enumerate(found):
                found[i] = row | study.measure(row, folder / row["name"], out, config.data.path)
        if found or not plan:
            typer.echo(write(study, study.answer(found, config), found, out, made))
            typer.echo(out / "index.html")
        if outcome.waiting:
            typer.echo(f"{len(outcome.waiting)} runs are still to do; the same command goes on")
        if outcome.failed:
            raise SystemExit(1)

    run.__doc__ = (
        f"{study.question}\n\n{study.reading}\n\n{study.source}. What is done is not trained "
        "again, what was stopped goes on: start it as often as you like."
    )
    signature = inspect.signature(run)
    # Rows have no networks that could be measured.
    without = {"methods": not study.methods, "rows": study.measure is not None}
    kept = [p for p in signature.parameters.values() if not without.get(p.name)]
    run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return run


def base(
    study: Study,
    recipe: str | None,
    data: str | None,
    data_path: str | None,
    settings: list[str],
) -> Config:
    """What all trainings of a study start from; the command line has the last word."""
    given: dict[str, Any] = parse_assignments(settings)
    if data is not None:
        given["data.name"] = data
    if data_path is not None:
        given["data.path"] = str(Path(data_path).expanduser().absolute())
    elsewhere = {"sparsity": "--sparsity", "seed": "--seeds"}
    elsewhere |= {"method": "--methods" if study.methods else "the study"}
    for key in {key for key in given if key in elsewhere or key in study.decides}:
        raise ConfigurationError(
            f"--set {key}=...: {elsewhere.get(key, 'the study')} decides that here, for all "
            "trainings"
        )
    config = resolve_config(recipe or default_recipe(data))
    if given.get("data.name", config.data.name) == "digits":
        config = apply(config, study.small, f"study {study.name}")
    return apply(config, given, "command line")


def _listed(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--{option} {text!r}: write values with commas between") from None


def _progress(planned: int) -> Callable[[str, Outcome], None]:
    def done(name: str, outcome: Outcome) -> None:
        ended = f"{len(outcome.rows) + len(outcome.failed)}/{planned} {name}"
        if name in outcome.failed:
            typer.echo(f"{ended}: {outcome.failed[name]}", err=True)
        else:
            typer.echo(f"{ended}: {100 * outcome.rows[name]['test_accuracy']:.2f} %")

    return done


for _study in STUDIES.values():
    app.command(_study.name)(command(_study))
