"""`feather demo`: a web page on this machine that answers images."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer


def demo(
    source: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory, or a file of feather export.")
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")
    ] = 7860,
    open: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser.")
    ] = True,
    top: Annotated[int, typer.Option(min=1, help="Number of classes to name.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FACTORY",
            help="The network of an exported file, if it is your own: it is imported and executed.",
        ),
    ] = None,
) -> None:
    """Serve a page on this machine: drop an image, see the sparse and the dense answer and times.

    The sparse network is compiled if the extra `runtime` is installed. The dense one is the dense
    baseline of RUN, if it was trained with --compare-dense; otherwise the same network in PyTorch.
    Ctrl-C ends the server.

    \f
    Example:
        >>> from ..training.errors import RunError
        >>> try:
        ...     demo(Path("runs/absent"))
        ... except RunError as error:
        ...     print(error)
        runs/absent: no such run directory or file
    """
    import torch

    from ..training.demo import load_demo
    from ..training.demo_server import DemoServer

    torch.set_num_threads(threads)
    shown = load_demo(source, threads=threads, network=network, top=top)
    try:
        with DemoServer(shown, port) as server:
            for note in shown.notes:
                typer.echo(note)
            typer.echo(f"{server.url} shows {shown.name}. Ctrl-C ends it.")
            sys.stdout.flush()  # also into a pipe
            if open:
                open_page(server.url)
            server.serve_forever()
    except KeyboardInterrupt:
        typer.echo()  # after the ^C of the terminal
    finally:
        shown.close()


def open_page(url: str) -> None:
    """Open a page in the user's browser, unless it would be one within the terminal.

    Args:
        url: the address.

    Example:
        >>> from unittest import mock
        >>> display = mock.patch.dict(os.environ, {"DISPLAY": ":0"})
        >>> with display, mock.patch.object(webbrowser, "open", print):
        ...     open_page("http://127.0.0.1:7860")
        http://127.0.0.1:7860
    """
    graphical = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if graphical:
        webbrowser.open(url)
