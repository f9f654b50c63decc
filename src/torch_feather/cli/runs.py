"""`feather evaluate` and `feather report`: the results of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import make_console, print_json

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


def evaluate(  # long: each option has its help
    run: RunArgument,
    data_path: Annotated[
        str | None, typer.Option(help="Folder of the data, if it has moved.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate the stored network of RUN on its test images.

    Reads RUN/model.safetensors, so the result is that of the file.

    \f
    Example:
        >>> import tempfile
        >>> from .. import models
        >>> from ..training import Config
        >>> from ..training.checkpoint import RunDirectory
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = RunDirectory(folder)
        ...     run.write_config(Config(network="resnet8"))
        ...     run.save_model(models.create("resnet8", num_classes=10, in_channels=1))
        ...     evaluate(Path(folder), device="cpu")
        359 test images of digits: accuracy ..., loss ...; 0... of the weights are zero, ...
    """
    from dataclasses import replace

    import torch_feather as feather

    from .. import models
    from ..training.average_precision import measure_name
    from ..training.checkpoint import RunDirectory
    from ..training.console import percent
    from ..training.data import class_names, eval_loader, load_dataset
    from ..training.errors import DataError
    from ..training.evaluation import evaluate as measure
    from ..training.loop import resolve_device
    from ..training.losses import make_loss

    directory = RunDirectory(run)
    config = directory.read_config()
    source = replace(config.data, path=data_path or config.data.path)
    data = load_dataset(replace(source, class_names=None), config.seed)
    try:
        class_names(source, data.class_names)
    except DataError as error:
        raise DataError(f"{directory.config_file}: {error}") from None
    model = models.create(config.network, data.classes, data.channels)
    directory.load_model(model)
    model.to(target := resolve_device(device))
    test = eval_loader(data, data.test, config, target)
    mean = make_loss(config, training=False)
    loss, accuracy = measure(model, test, config.system.amp, loss=mean)
    macs = feather.count_flops(model, data.example().to(target))
    zeros = feather.sparsity(model, config.include, config.exclude)
    several = data.test.labels.ndim == 2
    if json:
        costs = {"dense": macs.dense, "sparse": macs.sparse}
        found = {"images": len(data.test), "accuracy": accuracy, "loss": loss}
        found |= {"multi_label": True} if several else {}
        print_json({"run": str(run), "data": data.name, **found, "sparsity": zeros, "macs": costs})
        return
    make_console().print(
        f"{len(data.test):,} test images of {data.name}: "
        f"{measure_name(several)} {percent(accuracy)}, loss {loss:.4f}; "
        f"{percent(zeros)} of the weights are zero, "
        f"{macs.sparse:,} of {macs.dense:,} multiply-adds",
        highlight=False,
        soft_wrap=True,
    )


def report(
    run: RunArgument,
    json: Annotated[bool, typer.Option("--json", help="Print the file report.json.")] = False,
) -> None:
    """Show the results of RUN: accuracy, and zeros and multiply-adds per layer.

    \f
    Example:
        >>> import tempfile
        >>> from ..training import Config, train
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = Config(network="resnet8", sparsity=0.5, epochs=1, batch_size=512)
        ...     _ = train(config, folder)
        ...     report(Path(folder))
        <BLANKLINE>
        layer                       shape        weights    zeros  sparsity ...
        ...
                                test accuracy  non-zero weights  multiply-adds  training time
        feather 50.00... sparse ...
    """
    from ..training.checkpoint import RunDirectory
    from ..training.console import print_results

    directory = RunDirectory(run)
    results = directory.read_report()
    if json:
        typer.echo(directory.report_file.read_text(), nl=False)
    else:
        print_results(make_console(), results, run)
