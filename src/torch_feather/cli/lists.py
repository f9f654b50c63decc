"""`feather methods` and `feather recipes`."""

from __future__ import annotations

import inspect
from itertools import starmap

from .output import make_console


def methods() -> None:
    """List the values of --method, with the options of each method and their defaults.

    \f
    Example:
        >>> methods()
        method    description     options ...
        feather   ...
        dense     No sparsity: trains all weights. ...
    """
    from rich.markup import escape
    from rich.table import Table

    from ..errors import ConfigurationError
    from ..methods import available_methods, describe_method, method_options

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("description")
    table.add_column("options (--set options.NAME=VALUE)")
    for name in available_methods():
        try:
            options = ", ".join(starmap(_format, method_options(name).items()))
            table.add_row(*map(escape, (name, describe_method(name), options)))
        except ConfigurationError as error:  # a method of another package that cannot be imported
            table.add_row(escape(name), escape(f"not available: {error}"), "")
    table.add_row("dense", "No sparsity: trains all weights.", "")
    table.add_row("package.module:factory", "A method of your own, imported by its name.", "")
    make_console().print(table)


def _format(option: str, default: object) -> str:
    return option if default is inspect.Parameter.empty else f"{option}={default}"


def recipes() -> None:
    """List the values of --recipe.

    \f
    Example:
        >>> recipes()
        cifar10 ...
        digits          Scikit-learn's 8x8 digits ...
    """
    from rich.table import Table

    from ..recipes import available_recipes

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, about in available_recipes().items():
        table.add_row(name, about)
    make_console().print(table)
