"""Filters choose weights by name, type or a rule; `prunable.find_prunable` lists their forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .errors import ConfigurationError, some

Filter = str | re.Pattern[str] | type[nn.Module] | Callable[[nn.Module, str], bool]
Filters = Filter | Iterable[Filter] | None


def list_filters(filters: Filters) -> list[Filter] | None:
    """Return filters as a list, which can be read twice; None for None.

    Example:
        >>> list_filters(name for name in ("a.*", "b.*"))
        ['a.*', 'b.*']
    """
    return None if filters is None else list(flat_filters(filters))


def flat_filters(filters: Any) -> Iterator[Filter]:
    """Yield the filters in nested iterables.

    Raises:
        ConfigurationError: there is anything else.

    Example:
        >>> list(flat_filters(["a.*", ["b.*"]]))
        ['a.*', 'b.*']
    """
    rule = callable(filters) and not isinstance(filters, nn.Module)
    binary = isinstance(filters, re.Pattern) and isinstance(filters.pattern, bytes)
    if (isinstance(filters, str | re.Pattern | type) or rule) and not binary:
        yield filters
    elif isinstance(filters, Iterable):
        for one in filters:
            yield from flat_filters(one)
    else:
        raise ConfigurationError(
            "include and exclude take a glob, a compiled regex of text, a module type, a callable "
            f"(module, name) -> bool, or several of these; got {filters!r}."
        )


def matches_glob(pattern: str, name: str) -> bool:
    """Return whether a glob matches a name. Every name matches itself.

    Brackets match themselves too, because names may have them.

    Example:
        >>> matches_glob("*[0].weight", "stage[0].weight"), matches_glob("h.[01].*", "h.1.weight")
        (True, True)
    """
    literal = pattern.replace("[", "[[]")
    return pattern == name or fnmatchcase(name, literal) or fnmatchcase(name, pattern)


def nothing_matched(
    role: str, one: Filter, names: Iterable[str], kinds: Iterable[str], noun: str
) -> ConfigurationError:
    """Return the error for a filter without a match; it names similar candidates.

    Args:
        role: the argument that has the filter.
        one: the filter.
        names: names that it could match.
        kinds: types of modules that it could match.
        noun: what the names belong to.

    Example:
        >>> raise nothing_matched("exclude", "haed.*", ["head.weight"], [], "parameter")
        Traceback (most recent call last):
        torch_feather.errors.ConfigurationError: exclude: 'haed.*' matches ... mean 'head.*'?
    """
    if isinstance(one, type):
        hint = f" There are modules of type {some(list(dict.fromkeys(kinds)), 8)}."
        return ConfigurationError(
            f"{role}: {text_of(one)} holds no {noun}, so there is nothing to prune in it.{hint}"
        )
    names = list(dict.fromkeys(names))
    text = one if isinstance(one, str) else one.pattern if isinstance(one, re.Pattern) else ""
    core = text.replace("\\", "").strip("*.^$")
    modules = {f"{name.rpartition('.')[0]}.*" for name in names if "." in name}
    if f"{core}.*" in modules and text != f"{core}.*":
        hint = f"; did you mean {core + '.*'!r}?"
    elif core and any(core in name for name in names):
        hint = f"; did you mean {f'*{core}*'!r}?"
    elif near := get_close_matches(text, [*names, *modules], n=3):
        hint = f"; did you mean {' or '.join(map(repr, near))}?"
    else:
        hint = f". There are {some(names, 8)}."
    return ConfigurationError(
        f"{role}: {text_of(one)} matches the name of no {noun}, so there is nothing to prune in "
        f"it{hint}"
    )


def text_of(one: Filter) -> str:
    """Return a filter as text for a message.

    Example:
        >>> text_of("head.*"), text_of(nn.Linear)
        ("'head.*'", 'Linear')
    """
    return one.__name__ if isinstance(one, type) else repr(one)
