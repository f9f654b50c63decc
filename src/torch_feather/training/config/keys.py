"""Setting the fields of a configuration by dotted keys, with typed values."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...errors import ConfigurationError, nearest, shorten
from .schema import AUTO, Config

# Keys of version 0.1 that have another name now.
RENAMED_KEYS = {"system.graph": "system.cuda_graph"}
# Keys whose values are mappings of any names; those of `options` are keys themselves.
MAPPINGS = ("options.", "optimizer.arguments", "optimizer.layers")
# Values that are compared, not computed with: .inf turns them off.
MAY_BE_INFINITE = ("optimizer.clip", "system.checkpoint_seconds")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted keys. Mappings that are values of options stay as they are.

    Args:
        values: sections, or sections of sections, by name.
        prefix: start of all keys.

    Example:
        >>> flatten({"epochs": 3, "optimizer": {"lr": 1}})
        {'epochs': 3, 'optimizer.lr': 1}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and not name.startswith(MAPPINGS):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def known_keys(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of a configuration with its type.

    Args:
        cls: the dataclass of the configuration or of a section.
        prefix: start of all keys.

    Example:
        >>> dict(known_keys())["optimizer.lr"]
        <class 'float'>
    """
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from known_keys(hints[item.name], f"{item.name}.")
        else:
            yield f"{prefix}{item.name}", hints[item.name]


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return stored values, flattened, with the keys of version 0.1 replaced by today's.

    Use it for stored configurations. `apply` accepts old keys too, but warns.

    Args:
        values: nested sections or dotted keys.

    Example:
        >>> upgrade({"system": {"graph": True}})
        {'system.cuda_graph': True}
    """
    flat = flatten(values)
    renamed = _renamed(flat, Config().method)
    flat = {renamed.get(key, key): value for key, value in flat.items()}
    if not any(key.startswith("options.") for key in flat):
        return flat
    from ...methods import unused_options  # imports PyTorch

    options = {key.removeprefix("options."): value for key, value in flat.items()}
    for option in unused_options(str(flat.get("method", Config().method)), options):
        flat.pop(f"options.{option}", None)
    return flat


def _renamed(flat: Mapping[str, Any], method: str) -> dict[str, str]:
    """Return the old keys among those of `flat`, with their new names."""
    renamed = {old: new for old, new in RENAMED_KEYS.items() if old in flat}
    if not any(key.startswith("options.") for key in flat):
        return renamed
    from ...methods import RENAMED_OPTIONS  # imports PyTorch

    options = RENAMED_OPTIONS.get(str(flat.get("method", method)), {})
    for old, new in options.items():
        if f"options.{old}" in flat:
            renamed[f"options.{old}"] = f"options.{new}"
    return renamed


def apply(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """Return `config` with `values` set.

    Args:
        config: the configuration to start from; it is not changed.
        values: nested sections or dotted keys. Keys of version 0.1 are accepted with a
            `DeprecationWarning`.
        where: the source of the values, for messages.

    Raises:
        ConfigurationError: a key that does not exist (the message names the nearest one), or a
            value of the wrong type or out of range.

    Example:
        >>> apply(Config(), {"optimizer.lr": "5e-2", "epochs": 3}, "example").optimizer.lr
        0.05
    """
    flat = flatten(values)
    renamed = _renamed(flat, config.method)
    for old, new in renamed.items():
        warnings.warn(f"{where}: {old} is deprecated. Use {new}.", DeprecationWarning, stacklevel=2)
    types_of = dict(known_keys())
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for old, value in flat.items():
        key = renamed.get(old, old)
        if key == "options" and value in (None, {}):  # an empty mapping is a leaf of `flatten`
            continue
        section, dot, name = key.partition(".")
        fields = sections.setdefault(section, {}) if dot else top
        if section == "options":
            if not name:
                raise ConfigurationError(
                    f"{where}: {key} must hold names and values, such as 'p: 2', got "
                    f"{shorten(value)}"
                )
            fields[name] = _parse_number(f"{where}: {key}", value)
        elif section == "optimizer" and name.startswith("arguments."):
            found = _mapping(f"{where}: {section}", {name.removeprefix("arguments."): value})
            fields["arguments"] = fields.get("arguments", config.optimizer.arguments) | found
        elif key in types_of:
            fields[name if dot else key] = _convert(f"{where}: {key}", value, types_of[key])
        else:
            raise ConfigurationError(f"{where}: unknown key {shorten(key)}{_hint(key, types_of)}")
    _end_choices(config, top, {renamed.get(key, key) for key in flat})
    try:
        for section, fields in sections.items():
            before = getattr(config, section)
            top[section] = before | fields if section == "options" else replace(before, **fields)
        changed = replace(config, **top)
        if changed.options:
            _check_options(changed)
        return changed
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None


def _end_choices(config: Config, top: dict[str, Any], given: Collection[str]) -> None:
    """End in `top` the choices that given keys replace: of settings, and of the method."""
    if config.automatic and "automatic" not in top:
        top["automatic"] = [key for key in config.automatic if key not in given] or None
    if any(key == "method" or key.startswith("options.") for key in given):
        top.setdefault("method_reason", None)
    if top.get("method") == AUTO:
        top["options"] = {}  # those of another method


def _check_options(config: Config) -> None:
    """Check the types of the options of a known method."""
    from ...methods.option_types import check_option_types  # imports PyTorch
    from ...methods.registry import METHODS

    known = {k: v for k, v in config.options.items() if (k, v) != ("costs", "milliseconds")}
    if config.method in METHODS:
        check_option_types(config.method, METHODS[config.method], known)


def _hint(key: str, known: Collection[str]) -> str:
    """Like `nearest`, but also finds a key given without its section or in a wrong one."""
    by_name = {k.rpartition(".")[2]: k for k in known}
    name = key.rpartition(".")[2]
    hint = nearest(key, known)
    if name in by_name or hint == ".":
        hint = re.sub("'(.+)'", lambda match: repr(by_name[match[1]]), nearest(name, by_name))
    return f"; known are {', '.join(known)}" if hint == "." else hint


def _convert(key: str, value: Any, hint: Any) -> Any:
    """Convert `value` to its field's type; YAML reads 5e-4 as text and 1 as an int."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    kind = next(t for t in allowed if t is not type(None))
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = float(value)
        except ValueError:
            pass
        except OverflowError:
            raise ConfigurationError(f"{key} must be finite, got {shorten(value)}") from None
        else:
            if math.isfinite(number) or key.rpartition(": ")[2] in MAY_BE_INFINITE:
                return number
            raise ConfigurationError(f"{key} must be finite, got {shorten(value)}")
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return _checked_text(key, str(value))
    if kind == list[float] and isinstance(value, list):
        return [_convert(key, one, float) for one in value]
    if kind == list[str]:
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(one, str) for one in values):
            return [_checked_text(key, one) for one in values]
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return _mapping(key, value)
    names = {bool: "true or false", int: "an integer", float: "a number",
             str: "a string", list[float]: "a list of numbers",
             list[str]: "a string or a list of strings", dict[str, Any]: "names and values",
             dict[str, dict[str, float]]: "name patterns with values"}  # fmt: skip
    expected = names.get(kind, "a section with its own keys")
    raise ConfigurationError(f"{key} must be {expected}, got {shorten(value)}")


def _mapping(key: str, value: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a mapping, or a mapping of mappings, with texts that read as numbers converted."""
    found = {}
    for name, one in value.items():
        inner = f"{key}.{_checked_text(key, str(name))}"
        found[str(name)] = (
            _mapping(inner, one) if isinstance(one, Mapping) else _parse_number(inner, one)
        )
    return found


def _checked_text(key: str, text: str) -> str:
    """Return `text`, or raise an error if it cannot be stored or name a file."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigurationError(f"{key} must be text without NUL and surrogates, got {text!a}")
    return text


def _parse_number(key: str, value: Any) -> Any:
    """Convert text that reads as a number; YAML reads 5e-1 as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return _checked_text(key, value)
    return value
