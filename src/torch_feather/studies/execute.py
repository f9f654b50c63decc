"""What `feather study NAME` does: train the missing runs of a study, and write its page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from ..errors import ConfigurationError
from ..methods import available_methods
from ..training import Config, resolve_config
from ..training.config import DENSE, apply, default_recipe, parse_assignments
from ..training.distributed import Ranks
from ..training.errors import RunError
from ..training.loop import chosen
from .output import RunFacts, write_study
from .runner import Outcome, train_all
from .runs import Row, read_rows
from .study import GridAxes, Study


# long: each command-line option is a parameter.
def run_study(
    study: Study,
    *,
    methods: str | None = None,
    sparsity: str | None = None,
    seeds: str | None = None,
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
    time: bool = False,
) -> None:
    """Train the missing runs of a study and write its page.

    The parameters are the options of the command line, see `feather study NAME --help`.

    Raises:
        ConfigurationError: settings, data or methods that do not exist or do not fit the study.
        RunError: the output folder or a file of rows cannot be used.
        SystemExit: runs failed; the page was written from the others.

    Example:
        >>> import io, tempfile
        >>> from contextlib import redirect_stdout
        >>> from torch_feather.studies import STUDIES
        >>> with redirect_stdout(io.StringIO()):
        ...     folder = Path(tempfile.mkdtemp())
        ...     run_study(STUDIES["recipe"], out=folder)
        >>> (folder / "index.html").exists()
        True
    """
    config = base_config(study, recipe, data, data_path, settings or [])
    on_digits = config.data.name == "digits"
    sparsity = sparsity or (study.digits_sparsities if on_digits else study.sparsities)
    methods, seeds = methods or study.methods, seeds or study.seeds
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
        timed = time or not study.timed_on_request
        for i, row in enumerate(found):
            run = folder / row["name"]
            found[i] = row | study.measure(row, run, out, config.data.path, timed)
    if found or not plan:
        given = {"methods": methods, "recipe": config.recipe, "data": data, "sparsity": sparsity}
        given |= {"seeds": seeds, "data-path": "DATA" if data_path else None}
        command = _command_line(study, given if plan else {}, settings or [])
        facts = RunFacts(command, len(plan), outcome.failed)
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
        >>> from torch_feather.studies import STUDIES
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


def progress_text(row: Row) -> str:
    """Return the accuracy of a run for a progress line: on held-out images, if there are some.

    Choices are made while these lines are read, and test images must not decide them.

    Args:
        row: a finished run.

    Example:
        >>> progress_text({"test_accuracy": 0.5, "curve": {"val_acc": [0.25, 0.75]}})
        '75.00% of the validation images'
        >>> progress_text({"test_accuracy": 0.5, "curve": {"val_acc": [None, None]}})
        '50.00% of the test images'
    """
    validation = row["curve"]["val_acc"][-1]
    part = "test" if validation is None else "validation"
    accuracy = row["test_accuracy"] if validation is None else validation
    return f"{100 * accuracy:.2f}% of the {part} images"


def _print_progress(planned: int) -> Callable[[str, Outcome], None]:
    def on_end(name: str, outcome: Outcome) -> None:
        line = f"{len(outcome.rows) + len(outcome.failed)}/{planned} {name}"
        if name in outcome.failed:
            typer.echo(f"{line}: {outcome.failed[name]}", err=True)
        else:
            typer.echo(f"{line}: {progress_text(outcome.rows[name])}")

    return on_end
