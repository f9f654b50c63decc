"""Errors and warnings of torch-feather; each error is also a standard error of its kind."""

import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path


class FeatherError(Exception):
    """Base class of all errors of torch-feather.

    Example:
        >>> from torch_feather.operators import Power
        >>> try:
        ...     Power(0.5)
        ... except FeatherError as error:
        ...     print(type(error).__name__)
        ConfigurationError
    """


class ConfigurationError(FeatherError, ValueError):
    """An impossible request: a wrong option, model, optimizer or target.

    Example:
        >>> from torch_feather.operators import Power
        >>> try:
        ...     Power(0.5)
        ... except ConfigurationError as error:
        ...     print(error)
        p must be a number >= 1 (1 is soft thresholding; for hard use Hard()), got 0.5.
    """


class StateError(FeatherError, RuntimeError):
    """A loaded state, or the order of calls, does not fit this model or sparsifier.

    Example:
        >>> import torch, torch_feather as feather
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = feather.sparsify(model, optimizer, sparsity=0.5, total_steps=10)
        >>> try:
        ...     sparsifier.finalize()  # before any step
        ... except StateError as error:
        ...     print(error)
        After 0 of 10 steps the sparsity is 0.0000, not yet 0.5. ...
    """


class FileFormatError(FeatherError, ValueError):
    """A file that is truncated, damaged, of a newer version, or not a sparse file.

    Example:
        >>> import tempfile, torch, torch_feather as feather
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "model.sparse.safetensors"
        ...     feather.save_sparse({"weight": torch.eye(100)}, path)
        ...     _ = path.write_bytes(path.read_bytes()[:-1])  # truncated
        ...     try:
        ...         feather.load_sparse(path, torch.nn.Linear(100, 100, bias=False))
        ...     except FileFormatError:
        ...         print("the file is damaged")
        the file is damaged
    """


class NonFiniteWeightError(FeatherError, FloatingPointError):
    """A weight or a learned threshold became NaN, or training ends with a value not finite.

    Example:
        >>> import torch, torch_feather as feather
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = feather.sparsify(model, optimizer, sparsity=0.5, total_steps=10)
        >>> model(torch.full((1, 4), torch.nan)).sum().backward()
        >>> try:
        ...     optimizer.step()
        ... except NonFiniteWeightError as error:
        ...     print(error)
        Weights of weight are NaN. ...
    """


class FeatherWarning(UserWarning):
    """A condition that training survives but that the user should know.

    Example:
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", FeatherWarning)  # stop at the first one
        ...     try:
        ...         warn("Every weight of head is pruned.")
        ...     except FeatherWarning as error:
        ...         print(error)
        Every weight of head is pruned.
    """


class MethodChosen(FeatherWarning):
    """The method that `method="auto"` chose, and why. No fault, so it may be silenced.

    Example:
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", MethodChosen)
        ...     warn("method='auto' chose feather", MethodChosen)
    """


def warn(message: str, category: type[Warning] = FeatherWarning) -> None:
    """Issue a warning that points at the user's line (on Python 3.11, at the line in this package).

    Args:
        message: what happened, and what to do.
        category: the class of the warning.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn("The loss is not finite. Lower the learning rate.")
        >>> caught[0].category.__name__
        'FeatherWarning'
    """
    if sys.version_info >= (3, 12):
        modules = (sys.modules.get("torch"), sys.modules[__name__])
        internal = tuple(str(Path(m.__file__).parent) + os.sep for m in modules if m and m.__file__)
        warnings.warn(message, category, skip_file_prefixes=internal)
    else:
        warnings.warn(message, category, stacklevel=2)


# How messages name options: as Python keywords, as options of `feather train`, or as assignments.
_form = "{name}={value}"


def name_command_line_options(active: bool, *, assignments: bool = False) -> None:
    """Let messages name options as `--name value` instead of Python keywords.

    Args:
        active: whether the user gives options on the command line.
        assignments: whether the command takes them as `--set name=value`, as `feather study`.

    Example:
        >>> name_command_line_options(True)
        >>> print(option("exclude", ["fc.weight"]))
        --exclude '["fc.weight"]'
        >>> name_command_line_options(True, assignments=True)
        >>> print(option("min_density", 0.01, of_method=True))
        --set options.min_density=0.01
        >>> name_command_line_options(False)
    """
    global _form
    _form = "--set {name}={value}" if assignments else "--{name} {value}"
    if not active:
        _form = "{name}={value}"


def option(name: str, value: object = None, *, of_method: bool = False) -> str:
    """Return the text by which the user sets an option: a keyword, or an argument of the command.

    Args:
        name: the keyword of `sparsify`.
        value: the value to show; None for the name alone.
        of_method: whether it is an option of the method.

    Example:
        >>> option("exclude", ["fc.weight"]), option("min_density", 0.01, of_method=True)
        ('exclude=["fc.weight"]', 'min_density=0.01')
    """
    listed = isinstance(value, list | tuple)
    items = ", ".join(f'"{item}"' for item in value) if listed else ""  # type: ignore[attr-defined]
    text = f"[{items}]" if listed else "" if value is None else str(value)
    if not _form.startswith("--"):
        return f"{name}={text}"
    name = f"options.{name}" if of_method else name
    quoted = f"'{text}'" if listed else text
    return _form.format(name=name, value=quoted).rstrip()


def fill_layers(names: Sequence[str] = ()) -> str:
    """Return the advice for layers in which every weight is pruned.

    Args:
        names: names of their weights.

    Example:
        >>> fill_layers(["fc.weight"])[:67]
        'Exclude layers that must keep weights (exclude=["fc.weight"]), lowe'
    """
    listed = [*names[:3], *(["..."] if len(names) > 3 else [])]
    return (
        f"Exclude layers that must keep weights ({option('exclude', listed or None)}), lower the "
        "sparsity, or use a method that keeps a fraction of each layer, such as feather with "
        f"{option('min_density', 0.01, of_method=True)}."
    )


def printable(text: object) -> str:
    """Return the text of a path or name for messages: one line, without control characters.

    Example:
        >>> printable("a" + chr(10) + "b" + chr(0xDC80))
        'a\\\\nb\\\\udc80'
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def nearest(wrong: object, known: Iterable[str]) -> str:
    """Return the end of a sentence that names the known name most similar to `wrong`.

    Example:
        >>> nearest("cubik", ["cubic", "linear"])
        "; did you mean 'cubic'?"
    """
    near = get_close_matches(str(wrong), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def install_hint(extra: str) -> str:
    """Return the sentence that says how to install an extra.

    Args:
        extra: its name in pyproject.toml.

    Example:
        >>> install_hint("vision")
        "Run pip install 'torch-feather[vision]', or in a clone pip install -e '.[vision]'."
    """
    return f"Run pip install 'torch-feather[{extra}]', or in a clone pip install -e '.[{extra}]'."


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and the number of the others, as text.

    Args:
        names: the names.
        most: number of names to list.

    Example:
        >>> some(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def shorten(value: object, most: int = 60) -> str:
    """Return the `repr` of a value, cut after `most` characters.

    Example:
        >>> shorten("a" * 100, most=10)
        "'aaaaaa..."
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; deep nesting
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."
