"""`feather train`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import make_console, print_json
from .settings import as_flags

if TYPE_CHECKING:
    from ..training import Config

EXAMPLES = """
**Examples**

- `feather train` trains a small network on scikit-learn's digits, sparse and dense

- `feather train --recipe cifar100-small --data-path DATA/cifar100 --out runs/a`

- `feather train --recipe cifar100 --data-path DATA/cifar100 --network mobilenet_v1 --sparsity 0.98`

- `feather train --data cifar10 --data-path DATA/cifar10 --optimizer.lr 0.05 --options.p 2`

- `feather train --data imagefolder --data-path PHOTOS --network timm/resnet18 --pretrained`

- `feather train --recipe imagenet --data-path DATA/imagenet --system.compile true`

- `feather train --method package.module:factory` uses a method of your own

- `feather train --init runs/a --sparsity 0.98` starts from the network of another run

- `feather train --teacher runs/a/dense` also learns from the network of another run

- `torchrun --nproc-per-node 8 --no-python feather train --recipe imagenet --data-path ...`

- `feather train --resume --out runs/a` resumes an interrupted run
"""


# long: each command-line option is a parameter.
def train(
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Settings to start from, see `feather recipes`. "
            "[default: the recipe of --data, or digits]"
        ),
    ] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option(
            help="YAML file that overrides the recipe, such as config.yaml. Later ones override "
            "earlier ones."
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="resnet8, resnet20, mobilenet_v1, ...; timm/NAME; or package.module:factory."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "--data.name",
            help="digits, cifar10, cifar100, imagefolder; or package.module:factory for a data set "
            "of your own.",
        ),
    ] = None,
    data_path: Annotated[
        str | None,
        typer.Option(
            "--data-path",
            "--data.path",
            help="CIFAR: folder with train*.parquet and test*.parquet, or the unpacked archive. "
            "imagefolder: folder with train/ and val/, or tar files. "
            "A factory of your own: its argument path.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="See `feather methods`; auto, which chooses one; package.module:factory for a "
            "method of your own; or dense."
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Final fraction of weights that are zero, such as 0.95.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Initial weights: a run directory or a file. [default: random]"),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Initial weights: those published by timm.")
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            "--distillation.teacher",
            help="Teacher network: a run directory, a file, or timm/NAME.",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of initial weights, validation split, order and augmentation."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory. [default: a new one in runs/]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out from its checkpoint.")
    ] = False,
    compare_dense: Annotated[
        bool | None,
        typer.Option(
            "--compare-dense/--no-compare-dense", help="Also train a dense baseline, in RUN/dense."
        ),
    ] = None,
    track_masks: Annotated[
        bool | None,
        typer.Option(
            "--track-masks/--no-track-masks", help="Store the mask of each epoch in RUN/masks."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", hidden=True, help="Deprecated: --KEY VALUE."),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print the settings as YAML; train nothing."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print warnings, errors and the run directory alone.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print report.json at the end, and nothing else.")
    ] = False,
    *,
    given: dict[str, str] | None = None,
) -> None:
    """Train a sparse network into a run directory.

    The recipe is overridden by --config, and both by the options below. Options of the method are
    set by `--options.NAME VALUE`, see `feather methods`. Under `torchrun`, all processes train one
    network together.

    \f
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     train(
        ...         network="resnet8",
        ...         sparsity=0.5,
        ...         epochs=1,
        ...         batch_size=512,
        ...         compare_dense=False,
        ...         out=Path(folder),
        ...     )
        feather  epoch 1/1  loss ... sparsity 50.00... images/s ...
        <BLANKLINE>
        layer                       shape        weights    zeros  sparsity ...
        conv1.weight                32x1x3x3         288 ...
    """
    from ..training.config import PRETRAINED, TIMM, parse_assignments, to_yaml

    named_options: dict[str, Any] = {
        "network": network,
        "data.name": data,
        "data.path": data_path if _names_no_file(data, data_path) else _absolute(data_path),
        "method": method,
        "sparsity": sparsity,
        "init": _absolute(init),
        "distillation.teacher": teacher if (teacher or "").startswith(TIMM) else _absolute(teacher),
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "compare_dense": compare_dense,
        "track_masks": track_masks,
    }
    if pretrained:
        if init is not None:
            raise typer.BadParameter("--pretrained and --init both name initial weights")
        named_options["init"] = PRETRAINED
    overrides = {key: value for key, value in named_options.items() if value is not None}
    overrides |= parse_assignments(settings or [])
    if settings:
        from ..deprecation import warn_renamed

        key, _, value = settings[0].partition("=")
        (first,) = as_flags([f"--{key}={value}"])  # a flag, or as it was
        shown = f"--{key} {shlex.quote(value)}" if "=" in first else first
        warn_renamed("--set KEY=VALUE", f"--KEY VALUE, such as {shown}")
    for key, value in (given or {}).items():
        overrides |= parse_assignments([f"{key}={value}"], "command line:")
    if resume and out is None:
        raise typer.BadParameter("--resume requires --out RUN, the run to resume")
    named = recipe or config or resume or "data.name" in overrides
    if data_path is not None and not named:  # digits have no files
        raise typer.BadParameter(
            "--data-path requires --data: imagefolder for a folder of images; cifar10; or cifar100"
        )
    start = _configuration(recipe, config, overrides, out if resume else None)
    if print_config:
        typer.echo(to_yaml(start), nl=False)
        return
    _run(start, out, resume, quiet, json)


def _run(start: Config, out: Path | None, resume: bool, quiet: bool, json: bool) -> None:
    """Train, with as much output as was asked for."""
    from ..training.callbacks import Callback, Callbacks
    from ..training.checkpoint import RunDirectory
    from ..training.console import ConsoleCallback, print_results
    from ..training.distributed import process_group
    from ..training.loggers import logging_callbacks
    from ..training.loop import chosen
    from ..training.loop import train as run_training

    console = make_console()
    with process_group() as ranks:
        start = chosen(start, ranks, RunDirectory(out) if out and resume else None)
        folder = ranks.on_first(lambda: out or free_directory(start))
        # The console comes last, so that its progress bars cover the training alone.
        shown: list[Callback] = [] if quiet or json else [ConsoleCallback(console)]
        callback = Callbacks([*logging_callbacks(start), *shown])
        results = run_training(start, folder, resume=resume, callback=callback)
        if not ranks.first:
            return
        if json:
            print_json({"run": str(folder), **results})
        elif quiet:
            typer.echo(folder)
        else:
            print_results(console, results, folder)


def _configuration(
    recipe: str | None,
    files: list[Path] | None,
    overrides: dict[str, Any],
    resumed: Path | None,
) -> Config:
    """Return the configuration to train; without recipe and file, that of the resumed run."""
    from ..training.config import apply, default_recipe, resolve_config
    from ..training.errors import RunError

    if recipe is not None or files or resumed is None:
        named = recipe or default_recipe(overrides.get("data.name"))
        return resolve_config(named, files, overrides)
    from ..errors import warn
    from ..training.checkpoint import RunDirectory

    run = RunDirectory(resumed)
    stored = run.stored_config(warn)
    if stored is None and run.holds_a_run():
        raise RunError(
            f"{run.config_file}: missing, and no checkpoint holds the settings. Give those of the "
            f"run: feather train --resume --recipe NAME --KEY VALUE --out {resumed}"
        )
    if stored is None:
        raise RunError(f"{resumed}: no run to resume. Add --recipe to start one there.")
    return apply(stored, overrides, "command line")


def _names_no_file(data: str | None, path: str | None) -> bool:
    """Whether a path is for a factory of the user to interpret, such as the name of a data set."""
    from ..import_path import is_import_path

    return is_import_path(data) and path is not None and not Path(path).exists()


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def free_directory(config: Config) -> Path:
    """Return a run directory that is not in use, named after the configuration.

    Args:
        config: the configuration of the run.

    Example:
        >>> from ..training import Config
        >>> free_directory(Config(method="ste", sparsity=0.9, seed=1)).as_posix()
        'runs/digits-resnet20-ste-90-seed1'
    """
    from ..training.checkpoint import RunDirectory

    name = f"{config.data.name}-{config.network}-{config.method}"
    name = re.sub(r"[^\w.+-]", "_", name)  # timm/NAME, package.module:factory
    if config.sparsity:
        name += f"-{100 * config.sparsity:g}"
    base = Path("runs") / f"{name}-seed{config.seed}"
    candidate, number = base, 1
    while RunDirectory(candidate).holds_a_run():
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate
