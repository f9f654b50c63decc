"""`feather predict`: the classes of images."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..training.predict import Prediction


# long: each option has its help
def predict(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory, or a file of feather export.")
    ],
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="An image; a folder; or - for standard input.")
    ],
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of classes to name. [default: 3; if an image may have several classes, "
            "those above 50%, and all with --json]",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one line per image.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile the network for this CPU first.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="The network of an exported file, if it is your own: it is imported and executed.",
        ),
    ] = None,
) -> None:
    """Name the classes of images, with probabilities.

    Images are prepared as in the evaluation of the run. Images that cannot be read are reported;
    the exit code is then 1.

    \f
    Example:
        >>> from ..training.errors import RunError
        >>> try:
        ...     predict(Path("runs/absent"), Path("a.jpg"))
        ... except RunError as error:
        ...     print(error)
        runs/absent: no such run directory or file
    """
    import torch

    from ..training.data.images import decode_image
    from ..training.errors import DataError
    from ..training.predict import image_files, load_predictor

    torch.set_num_threads(threads)
    predictor = load_predictor(source, compiled=compiled, threads=threads, network=network)
    above = predictor.info.multi_label and top is None
    if top is None and not above:
        top = 3
    if str(image) == "-":
        try:
            pixels = decode_image(sys.stdin.buffer.read())
        except ValueError as error:
            raise DataError(f"standard input: cannot be decoded as an image ({error})") from None
        answers = iter(predictor.predict(["-"], [pixels], top))
    else:
        answers = predictor.predict_files(image_files(image), top)
    failed = False
    for answer in answers:
        failed |= answer.error is not None
        typer.echo(json_module.dumps(answer.to_dict()) if json else _line(answer, above))
    if failed:
        raise typer.Exit(1)


def _line(answer: Prediction, above: bool) -> str:
    """Return an answer as text; `above`: only the classes above 50%."""
    if answer.error is not None:
        return f"{answer.image}: not an image ({answer.error})"
    pairs = [*zip(answer.classes, answer.probabilities, strict=True)]
    if above:
        best, value = pairs[0]
        pairs = pairs[: len(answer.labels)]
        if not pairs:
            return f"{answer.image}: no class above 50% (highest: {best} {100 * value:.1f}%)"
    return f"{answer.image}: " + ", ".join(f"{name} {100 * value:.1f}%" for name, value in pairs)
