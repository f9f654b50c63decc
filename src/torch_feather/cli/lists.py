"""`feather methods` and `feather recipes`."""

from __future__ import annotations

import inspect
from itertools import starmap
from typing import Annotated, Any

import typer

from .output import make_console, print_json

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def methods(json: JsonOption = False) -> None:
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

    if json:
        print_json({name: _described(name) for name in available_methods()})
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("description")
    table.add_column("options (--options.NAME VALUE)")
    for name in available_methods():
        try:
            options = ", ".join(starmap(_format, method_options(name).items()))
            table.add_row(*map(escape, (name, describe_method(name), options)))
        except ConfigurationError as error:  # a method of another package that cannot be imported
            table.add_row(escape(name), escape(f"not available: {error}"), "")
    table.add_row("auto", "Chooses one of these when the training starts, and says why.", "")
    table.add_row("dense", "No sparsity: trains all weights.", "")
    table.add_row("package.module:factory", "A method of your own, imported by its name.", "")
    make_console().print(table)


def _described(name: str) -> dict[str, Any]:
    """Return description and options of a method as plain values."""
    from ..errors import ConfigurationError
    from ..methods import describe_method, method_options

    try:
        options = method_options(name)
        about = describe_method(name)
    except ConfigurationError as error:
        return {"error": str(error)}
    plain = {
        option: None if value is inspect.Parameter.empty else value
        for option, value in options.items()
    }
    kinds = (bool, int, float, str, type(None))
    values = {o: v if isinstance(v, kinds) else str(v) for o, v in plain.items()}
    return {"description": about, "options": values}


def _format(option: str, default: object) -> str:
    return option if default is inspect.Parameter.empty else f"{option}={default}"


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print the settings of this recipe.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the values of --recipe, or print the settings of one as YAML.

    \f
    Example:
        >>> recipes()
        cifar10 ...
        digits          Scikit-learn's 8x8 digits ...
        >>> recipes("digits")
        network: resnet8
        ...
    """
    import yaml
    from rich.table import Table

    from ..recipes import available_recipes, recipe_values

    if name is not None:
        values = recipe_values(name)
        print_json(values) if json else typer.echo(
            yaml.safe_dump(values, sort_keys=False), nl=False
        )
        return
    if json:
        print_json(available_recipes())
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for recipe, about in available_recipes().items():
        table.add_row(recipe, about)
    make_console().print(table)
