"""`feather evaluate` and `feather report`: the results of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import make_console, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from ..training.checkpoint import RunDirectory
    from ..training.mistakes import Mistakes

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


def evaluate(
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
    import torch_feather as feather

    from ..training import evaluation
    from ..training.average_precision import measure_name
    from ..training.checkpoint import RunDirectory
    from ..training.console import percent
    from ..training.data import Text, eval_loader
    from ..training.losses import make_loss
    from ..training.mistakes import load_trained

    trained = load_trained(RunDirectory(run), data_path, device)
    config, data, model, target = trained.config, trained.data, trained.model, trained.device
    test = eval_loader(data, data.test, config, target)
    mean = make_loss(config, training=False)
    loss, accuracy = evaluation.evaluate(model, test, config.system.amp, loss=mean)
    macs = feather.count_flops(model, data.example().to(target))
    zeros = feather.sparsity(model, config.include, config.exclude)
    several = data.multi_label
    text = isinstance(data.test, Text)
    if json:
        costs = {"dense": macs.dense, "sparse": macs.sparse}
        found = {"images": len(data.test), "accuracy": accuracy, "loss": loss}
        found |= {"multi_label": True} if several else {}
        found |= {"bits_per_character": evaluation.bits(loss)} if text else {}
        print_json({"run": str(run), "data": data.name, **found, "sparsity": zeros, "macs": costs})
        return
    make_console().print(
        f"{len(data.test):,} test {'windows' if text else 'images'} of {data.name}: "
        f"{measure_name(several)} {percent(accuracy)}, loss {loss:.4f}"
        f"{f' ({evaluation.bits(loss):.4f} bits per character)' if text else ''}; "
        f"{percent(zeros)} of the weights are zero, "
        f"{macs.sparse:,} of {macs.dense:,} multiply-adds",
        highlight=False,
        soft_wrap=True,
    )


def report(
    run: RunArgument,
    errors: Annotated[
        bool,
        typer.Option(
            "--errors",
            help="Show where the network is wrong: confusions, accuracy by class, and the worst "
            "images. Writes RUN/errors.html and RUN/confusion.png.",
        ),
    ] = False,
    data_path: Annotated[
        str | None, typer.Option(help="With --errors: folder of the data, if it has moved.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="With --errors: auto, cpu, cuda, ... [default: auto]")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print report.json, or the errors as JSON.")
    ] = False,
) -> None:
    """Show the results of RUN: accuracy, and zeros and multiply-adds per layer; or its errors.

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
    if errors:
        _report_errors(directory, data_path, device or "auto", json)
        return
    for name, value in (("--data-path", data_path), ("--device", device)):
        if value is not None:
            raise typer.BadParameter(f"{name} is used with --errors only")
    results = directory.read_report()
    if json:
        typer.echo(directory.report_file.read_text(), nl=False)
    else:
        print_results(make_console(), results, run)


def _report_errors(run: RunDirectory, data_path: str | None, device: str, json: bool) -> None:
    """Print and write where the network of a run is wrong."""
    from ..training.console import percent
    from ..training.mistakes import find_mistakes
    from ..training.mistakes_page import write_mistakes

    run.read_report()  # raises RunError if the run is not complete
    found = find_mistakes(run, data_path, device)
    files = list(map(str, write_mistakes(run, found)))
    if json:
        print_json({"run": str(run.path), **found.to_dict(), "files": files})
        return
    console = make_console()
    dense = "" if found.dense is None else f", dense baseline {percent(found.dense.accuracy)}"
    console.print(
        f"{int(found.matrix.counts.sum()):,} {found.part} images of {found.data}: accuracy "
        f"{percent(found.matrix.accuracy)}{dense}\n",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(errors_table(found))
    lines = [
        f"{one.image}: {one.label}, answered {one.answer} {100 * one.probability:.1f}%"
        for one in found.worst
    ]
    if lines:
        lines = ["", "most wrong:", *lines]
    console.print("\n".join([*lines, "", *files]), highlight=False, markup=False, soft_wrap=True)


def errors_table(found: Mistakes, most: int = 20) -> Table:
    """Return accuracy by class as a table, the least accurate classes first.

    Args:
        found: the errors of a network.
        most: number of classes to show.

    Example:
        >>> import numpy as np
        >>> from ..analysis.confusion import ConfusionMatrix
        >>> from ..training.mistakes import Mistakes
        >>> matrix = ConfusionMatrix(("cat", "dog"), np.array([[3, 1], [0, 4]]))
        >>> make_console().print(errors_table(Mistakes("pets", "test", matrix, [])))
        class  images  accuracy  most frequent error
        cat         4   75.00...  dog
        dog         4  100.00...
    """
    from rich.markup import escape
    from rich.table import Table

    from ..training.mistakes_page import class_rows

    accuracies = found.matrix.by_class()
    order = sorted(
        (i for i, row in enumerate(accuracies) if row.images),
        key=lambda i: accuracies[i].correct / accuracies[i].images,
    )
    caption = None
    if len(order) > most:
        caption = f"the {most} least accurate of {len(order)} classes"
    table = Table(
        box=None, header_style="bold", pad_edge=False, caption=caption, caption_justify="left"
    )
    table.add_column("class")
    table.add_column("images", justify="right")
    table.add_column("accuracy", justify="right")
    if found.dense is not None:
        table.add_column("dense baseline", justify="right")
    table.add_column("most frequent error")
    rows = class_rows(found)
    for i in order[:most]:
        table.add_row(*map(escape, rows[i]))
    return table
