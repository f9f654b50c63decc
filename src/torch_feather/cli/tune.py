"""`feather tune`: a search for settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import print_json


# long: each option has its help
def tune(
    out: Annotated[Path, typer.Option(help="Folder of the search.")],
    recipe: Annotated[
        str | None,
        typer.Option(help="Settings to start from. [default: the recipe of --data, or digits]"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file that overrides the recipe, such as config.yaml.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="digits, cifar10, cifar100 or imagefolder.")
    ] = None,
    data_path: Annotated[Path | None, typer.Option(help="Folder of the data.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of all trials, such as sparsity=0.98."
        ),
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LOW:HIGH",
            help="What is searched: KEY=LOW:HIGH, KEY=LOW:HIGH:log or KEY=A,B,C. [default: "
            "a tenth to ten times the learning rate, and theta from 0 to 1]",
        ),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Training runs in all.")] = 20,
    minutes: Annotated[
        float | None, typer.Option(help="Begin no training run after that time.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print all trials as JSON, the best one first.")
    ] = False,
) -> None:
    """Search for settings with the highest accuracy on the validation images.

    Each trial is a training run in OUT/trials. Repeat the command to resume an interrupted search.
    Then train with the best settings: `feather train --config OUT/best.yaml`.

    \f
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tune(Path(folder), settings=["epochs=1", "batch_size=512"], trials=1)
        trial 0: ...% ...
        trial  accuracy  optimizer.lr  options.theta
            0 ...
        settings of the best trial: ...best.yaml
    """
    from ..training.config import default_recipe, parse_assignments, resolve_config
    from ..training.tuning import Trial, as_table, parse_space
    from ..training.tuning import tune as run_search

    given = {"data.name": data, "data.path": data_path and str(data_path.expanduser().absolute())}
    overrides = {key: value for key, value in given.items() if value is not None}
    overrides |= parse_assignments(settings or [])
    start = resolve_config(recipe or default_recipe(data), config, overrides)

    def show(trial: Trial) -> None:
        accuracy = "diverged" if trial.accuracy is None else f"{trial.accuracy:.2%}"
        values = ", ".join(f"{key}={value}" for key, value in trial.values.items())
        typer.echo(f"trial {trial.number}: {accuracy} {values}", err=json)

    space = parse_space(search) if search else None
    found = run_search(start, out, trials=trials, space=space, minutes=minutes, on_end=show)
    best = str(out / "best.yaml") if found and found[0].accuracy is not None else None
    if json:
        trials_found = [
            {"trial": one.number, "accuracy": one.accuracy, "settings": dict(one.values)}
            for one in found
        ]
        print_json({"out": str(out), "best": best, "trials": trials_found})
        return
    typer.echo(as_table(found))
    if best:
        typer.echo(f"settings of the best trial: {best}")
