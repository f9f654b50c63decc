"""The command `feather`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

try:
    import rich  # noqa: F401
    import typer
    import yaml  # noqa: F401
except ImportError as error:
    raise SystemExit(
        f"feather: the command line needs {error.name}; install it with: "
        "pip install 'torch-feather[train]'"
    ) from None

app = typer.Typer(
    name="feather",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Sparse training for PyTorch: train networks with 90 to 99.5 % of their weights zero.\n\n"
    "Start with `feather train`: a minute, no download.",
)

TRAIN_EXAMPLES = """
**Examples**

- `feather train` trains a small network on scikit-learn's digits, sparse and dense

- `feather train --recipe cifar100-small --data-path DATA/cifar100 --out runs/a`

- `feather train --recipe cifar100 --data-path DATA/cifar100 --network mobilenet_v1 --sparsity 0.98`

- `feather train --data cifar10 --data-path DATA/cifar10 --set optimizer.lr=0.05 --set options.p=2`

- `feather train --recipe imagenet --data-path DATA/imagenet --set system.compile=true`

- `feather train --init runs/a --sparsity 0.98` starts from the network of another run

- `feather train --teacher runs/a/dense` learns from the network of another run, too

- `torchrun --nproc-per-node 8 --no-python feather train --recipe imagenet --data-path ...`

- `feather train --resume --out runs/a` continues a run that was stopped or killed
"""


@app.command(epilog=TRAIN_EXAMPLES)
def train(
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Settings to start from, see `feather recipes`. "
            "[default: that of --data, else digits]"
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file laid over the recipe, such as a config.yaml.")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="resnet8, resnet20, mobilenet_v1, ..., or timm/NAME.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="digits, cifar10, cifar100 or imagefolder.")
    ] = None,
    data_path: Annotated[
        str | None,
        typer.Option(
            help="CIFAR: folder with train*.parquet and test*.parquet, or the unpacked archive. "
            "imagefolder: folder with train/ and val/, or tar file(s)."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="See `feather methods`; or `dense` for no sparsity.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Final share of zeros among the weights, such as 0.95.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Weights to start from: a run directory, or a file. [default: random]"),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Network to learn from too: a run directory, a file, or timm/NAME."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides initial weights, split, order, augmentation.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory. [default: a new one under runs/]")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out where it stopped.")
    ] = False,
    compare_dense: Annotated[
        bool | None,
        typer.Option(
            "--compare-dense/--no-compare-dense",
            help="Also train the dense twin.",
        ),
    ] = None,
    track_masks: Annotated[
        bool | None,
        typer.Option(
            "--track-masks/--no-track-masks", help="Keep the mask of every epoch, in RUN/masks."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any key of config.yaml, such as optimizer.lr=0.05."
        ),
    ] = None,
) -> None:
    """Train a sparse network into a run directory.

    Settings come from the recipe, then from --config, then from the options here. Started by
    `torchrun`, its processes train one network together.
    """
    from .models import TIMM
    from .training.checkpoint import RunDirectory
    from .training.config import (
        apply,
        default_recipe,
        load_config,
        parse_assignments,
        resolve_config,
    )
    from .training.console import ConsoleWatch, print_results
    from .training.distributed import joined
    from .training.errors import RunError
    from .training.loggers import observers
    from .training.loop import train as run_training
    from .training.watch import Watches

    given: dict[str, Any] = {
        "network": network,
        "data.name": data,
        "data.path": _absolute(data_path),
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
    overrides = {key: value for key, value in given.items() if value is not None}
    overrides |= parse_assignments(settings or [])

    if resume and out is None:
        raise typer.BadParameter("say which run to continue: --resume --out RUN")
    old = RunDirectory(out).config_file if resume and out is not None else None
    if recipe is None and config is None and old is not None:
        if not old.exists():
            raise RunError(f"{out}: no run to resume (a --recipe would let it start there)")
        start = apply(load_config(old), overrides, "command line")
    else:
        start = resolve_config(recipe or default_recipe(data), config, overrides)
    name = f"{start.data.name}-{start.network}-{start.method}"
    console = _console()
    with joined() as ranks:
        folder = ranks.on_first(lambda: out or _free_directory(name, start))
        # The console comes last, so that its bars are there for the training alone.
        watch = Watches([*observers(start), ConsoleWatch(console)])
        results = run_training(start, folder, resume=resume, watch=watch)
        if ranks.first:
            print_results(console, results, folder)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def _free_directory(name: str, config: Any) -> Path:
    from .training.checkpoint import RunDirectory

    name = name.replace("/", "_")
    if config.sparsity:
        name += f"-{100 * config.sparsity:g}"
    base = Path("runs") / f"{name}-seed{config.seed}"
    candidate, number = base, 1
    while RunDirectory(candidate).holds_a_run():
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate


class Studies(typer.core.TyperGroup):
    """The commands of `feather study`, not imported before one asks for them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All studies."""
        return list(self._load())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The study of that name, or None."""
        return self._load().get(cmd_name)

    def _load(self) -> dict[str, Any]:
        from .studies.command import app as studies

        group: Any = typer.main.get_command(studies)
        return group.commands


app.add_typer(
    typer.Typer(
        cls=Studies,
        no_args_is_help=True,
        help="Every table and figure of the paper's supplement, as trainings anyone can repeat.",
    ),
    name="study",
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


@app.command()
def evaluate(
    run: RunArgument,
    data_path: Annotated[
        str | None, typer.Option(help="Where the data is now, if not where it was.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Measure the stored network of RUN on its test images.

    Reads RUN/model.safetensors, so it checks what a user of that file would get.
    """
    from dataclasses import replace

    import torch_feather as feather

    from . import models
    from .training.checkpoint import RunDirectory
    from .training.console import percent
    from .training.data import eval_loader, load_dataset
    from .training.evaluation import evaluate as measure
    from .training.loop import resolve_device

    directory = RunDirectory(run)
    config = directory.read_config()
    data = load_dataset(replace(config.data, path=data_path or config.data.path), config.seed)
    model = models.create(config.network, data.classes, data.channels)
    directory.load_model(model)
    target = resolve_device(device)
    model.to(target)
    test = eval_loader(data, data.test, config, target)
    loss, accuracy = measure(model, test, config.system.amp)
    macs = feather.count_flops(model, data.example().to(target))
    zeros = feather.sparsity(model, config.include, config.exclude)
    _console().print(
        f"{len(data.test):,} test images of {data.name}: accuracy {percent(accuracy)}, "
        f"loss {loss:.4f}; {percent(zeros)} of the weights are zero, "
        f"{macs.sparse:,} of {macs.dense:,} multiply-adds",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def report(
    run: RunArgument,
    json: Annotated[bool, typer.Option("--json", help="Print report.json itself.")] = False,
) -> None:
    """Show what RUN reached: accuracy, and zeros and multiply-adds per layer."""
    from .training.checkpoint import RunDirectory
    from .training.console import print_results

    directory = RunDirectory(run)
    results = directory.read_report()
    if json:
        typer.echo(directory.report_file.read_text(), nl=False)
    else:
        print_results(_console(), results, run)


@app.command()
def export(
    run: RunArgument,
    format: Annotated[
        str, typer.Option(help="sparse (small), safetensors (plain keys, dense) or onnx.")
    ] = "sparse",
    out: Annotated[Path | None, typer.Option(help="The file. [default: one in RUN]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Sparse: store weights as float16, bfloat16 or float32.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Put it on the Hugging Face hub, with a card."),
    ] = None,
    data_path: Annotated[
        str | None, typer.Option(help="Where the data is now, for ONNX of old runs.")
    ] = None,
) -> None:
    """Write the network of RUN as a file for those who use it."""
    import torch

    from .training import export_run as exports
    from .training.checkpoint import RunDirectory

    if dtype is not None and dtype not in ("float16", "bfloat16", "float32"):
        raise typer.BadParameter(f"--dtype {dtype}: float16, bfloat16 or float32")
    if push is not None and format != "sparse":
        raise typer.BadParameter("--push puts the format sparse on the hub")
    directory = RunDirectory(run)
    converted = getattr(torch, dtype) if dtype else None
    file = exports.export_run(directory, format, out, converted, data_path)
    typer.echo(f"{file}: {exports.describe(directory, file, format)}")
    if push is not None:
        typer.echo(f"on the hub: {exports.push(directory, file, push)}")


@app.command()
def bench(
    run: RunArgument,
    batch: Annotated[int, typer.Option(help="Images per call.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of this machine.")] = 1,
    choices: Annotated[
        Path | None,
        typer.Option(help="How each layer runs: read where the file exists, else written."),
    ] = None,
    data_path: Annotated[
        str | None, typer.Option(help="Where the data is now, for old runs.")
    ] = None,
) -> None:
    """Time the network of RUN on this CPU: dense, as PyTorch runs it, and sparse.

    Shows for each layer how long it takes both ways, and which way it runs.
    """
    import torch

    from .runtime import compile_sparse
    from .runtime.timing import alternate
    from .training.checkpoint import RunDirectory
    from .training.export_run import load_network

    torch.set_num_threads(threads)
    model, example = load_network(RunDirectory(run), data_path)
    model.eval()
    x = torch.randn(batch, *example.shape[1:])
    known = choices if choices is not None and choices.exists() else None
    sparse = compile_sparse(model, x, threads=threads, choices=known)
    if choices is not None and known is None:
        sparse.save_choices(choices)
    with torch.inference_mode():
        dense_ms, sparse_ms = alternate([lambda: model(x), lambda: sparse(x)])
        wanted, found = model(x), sparse(x)
    error = float((wanted - found).abs().max() / wanted.abs().max())
    typer.echo(f"{sparse}\n")
    typer.echo(
        f"batch {batch}, {threads} thread(s): PyTorch {dense_ms:.3f} ms, sparse {sparse_ms:.3f} "
        f"ms, {dense_ms / sparse_ms:.2f} times as fast; largest difference {error:.1e} of the "
        "largest output"
    )


@app.command()
def methods() -> None:
    """List what --method accepts, with each method's options and their defaults."""
    from rich.table import Table

    from .methods import METHODS, method_options

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("what it is")
    table.add_column("options (--set options.NAME=VALUE)")
    for name, build in METHODS.items():
        about = (build.__doc__ or "").strip().splitlines()[0] if build.__doc__ else ""
        options = ", ".join(f"{key}={value}" for key, value in method_options(name).items())
        table.add_row(name, about, options)
    table.add_row("dense", "No sparsity: the network as it is.", "")
    _console().print(table)


@app.command()
def recipes() -> None:
    """List what --recipe accepts."""
    from rich.table import Table

    from .recipes import available_recipes

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, about in available_recipes().items():
        table.add_row(name, about)
    _console().print(table)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def main() -> None:
    """Run the command; what a user can put right ends in one line, not in a traceback.

    `FEATHER_TRACEBACK=1` shows the traceback all the same.
    """
    import torch

    from .errors import FeatherError
    from .training.errors import Interrupted

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except Interrupted as error:
        _fail(str(error), 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except torch.OutOfMemoryError:
        _fail("the GPU's memory is full; try a smaller --batch-size, or --set system.amp=true", 1)
    except (FeatherError, OSError, ValueError, ImportError) as error:
        if os.environ.get("FEATHER_TRACEBACK"):
            raise
        _fail(str(error) or type(error).__name__, 1)


def _show_warning(message: Warning | str, *details: object, **more: object) -> None:
    print(f"feather: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    who = "feather" if rank == "0" else f"feather, rank {rank}"
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
