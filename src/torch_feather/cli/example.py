"""`feather example`: images and a network for the first steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import make_console


def example(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
) -> None:
    """Make images of three classes and a small network trained on seven others. Takes a minute.

    FOLDER/photos has the images, FOLDER/network the network. Nothing is downloaded: the images are
    scikit-learn's handwritten digits.

    \f
    Example:
        >>> import tempfile
        >>> from ..training.errors import RunError
        >>> full = Path(tempfile.mkdtemp())
        >>> (full / "a.txt").touch()
        >>> try:
        ...     example(full)
        ... except RunError as error:
        ...     print(error)
        /...: is not empty. Choose another folder.
    """
    from ..training.console import ConsoleCallback, print_results
    from ..training.example import example_config, write_example_images
    from ..training.loop import train

    seven, three = write_example_images(folder)
    network = folder / "network"
    console = make_console()
    results = train(example_config(seven), network, callback=ConsoleCallback(console))
    print_results(console, results, network)
    console.print(
        f"images of three other classes: {three}\n"
        f"next: feather train --data imagefolder --data-path {three} --init {network}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
