"""Every setting of a run as an option of the command line: `--optimizer.lr 0.05`.

The options are made from the fields of the configuration. Typer parses them, names near ones for a
misspelled one, and completes them in a shell. Their values are YAML, with the types of the
settings.
"""

from __future__ import annotations

import functools
import inspect
import re
import shlex
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
import yaml

OPTIONS = "options."
# Parameters of other names that set a key.
ALIASES = {"data_path": "data.path", "data": "data.name", "teacher": "distillation.teacher"}
# Settings that are flags, such as --no-track-masks; they take a value too, as all settings.
FLAGS = ("compare-dense", "track-masks")


class SettingsCommand(typer.core.TyperCommand):
    """A command whose flags take a value too: `--compare-dense false`.

    Example:
        >>> SettingsCommand("train").name
        'train'
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, after values of flags became flags."""
        return super().parse_args(ctx, as_flags(args))


def as_flags(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which values of flags are replaced by the flag that means the same.

    Args:
        arguments: arguments of the command line.

    Raises:
        BadParameter: a flag with a value other than true and false.

    Example:
        >>> as_flags(["--compare_dense", "false", "--track-masks=true", "--epochs", "3"])
        ['--no-compare-dense', '--track-masks', '--epochs', '3']
    """
    found: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        flag = name.removeprefix("--").replace("_", "-")
        if not name.startswith("--") or flag not in FLAGS:
            found.append(argument)
            continue
        if not equals:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        if value.lower() not in ("true", "false"):
            raise typer.BadParameter(
                f"{name} must be true or false, got {value!r}. Write --{flag} or --no-{flag}"
            )
        found.append(f"--{flag}" if value.lower() == "true" else f"--no-{flag}")
    return found


def with_settings(
    function: Callable[..., None], arguments: Sequence[str] = (), *, complete: bool = True
) -> Callable[..., None]:
    """Return a command with an option for each setting, besides the parameters of a function.

    The function gets the given ones as `given`, texts by key. With `--help`, the options show the
    values in force: of the recipe and the files that are named with it.

    Args:
        function: the command; it has a parameter `given`.
        arguments: arguments of the command line, which name the options of a method.
        complete: whether to make the options; without, the command is only listed.

    Example:
        >>> def show(epochs: int | None = None, *, given: dict[str, str]) -> None:
        ...     print(epochs, given)
        >>> command = with_settings(show, ["--options.p", "2"])
        >>> command(epochs=3, optimizer__lr="0.05", options__p="2")
        3 {'optimizer.lr': '0.05', 'options.p': '2'}
    """
    own = [p for name, p in inspect.signature(function).parameters.items() if name != "given"]
    hints = get_type_hints(function, include_extras=True)
    shown = values_in_force(arguments) if {"--help", "-h"} & {*arguments} else {}
    if not complete:
        arguments = ()
    taken = {ALIASES.get(p.name, p.name): p for p in own}
    named = [a.partition("=")[0][2:] for a in arguments if a.startswith(f"--{OPTIONS}")]
    keys = [key for key in settings_help() if key not in taken] if complete else []
    # The method, known later, checks the names of its options.
    keys += dict.fromkeys(name.replace("-", "_") for name in named)
    for key in taken.keys() & shown.keys():
        hints[taken[key].name] = _showing(hints[taken[key].name], shown[key])
    parameters = [p.replace(annotation=hints[p.name]) for p in own]
    for key in keys:
        parameters.append(
            inspect.Parameter(
                key.replace(".", "__"),
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[str | None, _option(key, shown.get(key))],
            )
        )

    @functools.wraps(function)
    def command(**values: Any) -> None:
        texts = {key: values.pop(key.replace(".", "__"), None) for key in keys}
        given = {key: text for key, text in texts.items() if text is not None}
        function(**values, given=given)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _option(key: str, value: str | None) -> Any:
    """Return the option of a setting; `value` is what is in force."""
    section = key.rpartition(".")[0]
    return typer.Option(
        f"--{key}",
        help=_with_default(settings_help().get(key, ""), value),
        metavar="VALUE",
        hidden=key.startswith(OPTIONS),
        rich_help_panel=f"Settings: {section}" if section else "More settings",
    )


def _showing(annotation: Any, value: str) -> Any:
    """Return the annotation of a parameter whose help shows the value in force."""
    kind, option = annotation.__origin__, copy(annotation.__metadata__[0])
    option.help = _with_default(option.help, value)
    return Annotated[kind, option]


def _with_default(help: str, value: str | None) -> str:
    if value is None:
        return help
    return re.sub(r" *\[default: [^\]]*\]$", "", help) + f" [default: {value}]"


@cache
def settings_help() -> dict[str, str]:
    """Return what each setting means, by key, from the comments at the fields.

    Example:
        >>> settings_help()["data.flip"]
        'mirror each training image with probability 1/2'
    """
    from ..training.config import Config

    return _comments(Config)


def _comments(cls: type, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    hints, lines = get_type_hints(cls), _source_lines(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            found |= _comments(hints[field.name], f"{field.name}.")
            continue
        at = next(i for i, one in enumerate(lines) if re.match(rf"    {field.name}: ", one))
        comment = lines[at].partition("  # ")[2]
        above = at
        while lines[above - 1].startswith("    # "):
            above -= 1
        before = " ".join(line.strip().removeprefix("# ") for line in lines[above:at])
        if f"{prefix}{field.name}" not in ("options", "recipe", "method_reason"):
            found[f"{prefix}{field.name}"] = comment or before
    return found


def _source_lines(cls: type) -> list[str]:
    """Return the source of a class of the top level. `inspect.getsource` takes much longer."""
    lines = Path(inspect.getfile(cls)).read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if re.match(rf"class {cls.__name__}\b", line))
    later = range(begin + 1, len(lines))
    return lines[begin : next((i for i in later if lines[i][:1] not in ("", " ")), len(lines))]


def values_in_force(arguments: Sequence[str]) -> dict[str, str]:
    """Return the settings that a command would use, as text by key.

    Args:
        arguments: arguments of `feather train`. The recipe, files and data that they name count.

    Raises:
        FeatherError: an unknown recipe, or a file that cannot be read.

    Example:
        >>> values_in_force(["--recipe", "cifar100", "--help"])["optimizer.weight_decay"]
        '0.0005'
    """
    from ..training.config import default_recipe, flatten, resolve_config, to_dict

    def named(option: str) -> list[str]:
        texts = [a.partition("=")[2] for a in arguments if a.startswith(f"{option}=")]
        pairs = pairwise(arguments)
        return texts + [value for name, value in pairs if name == option]

    data = named("--data") or named("--data.name")
    recipe = (named("--recipe") or [default_recipe(data[-1] if data else None)])[-1]
    config = resolve_config(recipe, [Path(file) for file in named("--config")])
    chosen = dict.fromkeys(config.automatic or (), "chosen when the training starts")
    return {key: as_text(value) for key, value in flatten(to_dict(config)).items()} | chosen


def misplaced_option(arguments: Sequence[str]) -> str | None:
    """Return what is wrong with a folder without option, or an option that lacks its section.

    None stands for neither.

    Args:
        arguments: arguments of the command line.

    Example:
        >>> misplaced_option(["train", "--lr", "0.1"])
        'no such option: --lr. Perhaps you meant --optimizer.lr'
    """
    if arguments[:1] != ["train"]:
        return None
    if arguments[1:] and Path(arguments[1]).is_dir():  # as other commands take a folder
        folder = shlex.quote(arguments[1])
        return (
            f"unexpected {folder}. For images of your own: --data imagefolder --data-path {folder}"
        )
    for argument in arguments:
        name = argument.partition("=")[0]
        last = name.removeprefix("--").rpartition(".")[2].replace("-", "_")
        keys = [key for key in settings_help() if key.rpartition(".")[2] == last]
        known = name.removeprefix("--").replace("-", "_") in (*settings_help(), *ALIASES)
        sectioned = [f"--{key}" for key in keys if "." in key]
        if name.startswith("--") and sectioned and not known:
            return f"no such option: {name}. Perhaps you meant {' or '.join(sectioned)}"
    return None


def as_text(value: Any) -> str:
    """Return a value as it is written on the command line and in YAML.

    Args:
        value: a plain value.

    Example:
        >>> as_text(None), as_text(["a", "b"]), as_text(True)
        ('null', '[a, b]', 'true')
    """
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
