"""Checks of files that may hold anything, and readers that use them.

A file can be whole and still be wrong: edited, of another program, or with keys missing. All that
is read from a run directory is checked here before it is used.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import shorten
from .errors import RunError

Check = Callable[[Any, str], None]
"""Raises `ContentError` if a value, whose position is given as text, is not as expected."""

MAX_BYTES = 256 * 2**20
INT64 = 2**63 - 1


class ContentError(ValueError):
    """A value that a file must not hold; the message has its position.

    Example:
        >>> text(3, "report.network")
        Traceback (most recent call last):
        torch_feather.training.content.ContentError: report.network must be text, got 3
    """


def require(condition: bool, at: str, expected: str, value: Any) -> None:
    """Raise a ContentError that says what is expected at a position.

    Example:
        >>> try:
        ...     require(False, "macs", "an integer", "x")
        ... except ContentError as error:
        ...     print(error)
        macs must be an integer, got 'x'
    """
    if not condition:
        large = isinstance(value, dict | list | Tensor)  # whose text may take long
        shown = type(value).__name__ if large else shorten(value)
        raise ContentError(f"{at or 'the content'} must be {expected}, got {shown}")


def integer(least: int = 0, most: int = INT64) -> Check:
    """Return a check for integers within bounds.

    Example:
        >>> integer(1)(0, "epochs")
        Traceback (most recent call last):
        torch_feather.training.content.ContentError: epochs must be an integer from 1 to ..., got 0
    """

    def check(value: Any, at: str) -> None:
        require(type(value) is int, at, "an integer", value)
        require(least <= value <= most, at, f"an integer from {least} to {most}", value)

    return check


def number(least: float = -math.inf, most: float = math.inf) -> Check:
    """Return a check for numbers within bounds. Without bounds they may be infinite or NaN.

    Example:
        >>> number(0, 1)(1.5, "sparsity")
        Traceback (most recent call last):
        torch_feather.training.content.ContentError: sparsity must be a number from 0 to 1, got 1.5
    """
    bounded = math.isfinite(least) or math.isfinite(most)

    def check(value: Any, at: str) -> None:
        require(type(value) in (int, float), at, "a number", value)
        require(abs(value) < 2**1000 or type(value) is float, at, "a number", value)
        expected = f"a number from {least:g} to {most:g}" if math.isfinite(most) else "not negative"
        require(not bounded or least <= value <= most, at, expected, value)
        require(not bounded or math.isfinite(value), at, "finite", value)

    return check


def text(value: Any, at: str) -> None:
    """Check for text without control characters, which could write to a terminal.

    Example:
        >>> text("a" + chr(27), "name")
        Traceback (most recent call last):
        torch_feather.training.content.ContentError: name must be printable text, got 'a\\x1b'
    """
    require(isinstance(value, str), at, "text", value)
    require(len(value) <= 10_000, at, "at most 10,000 characters", value)
    require(value.isprintable() or not _has_controls(value), at, "printable text", value)


def _has_controls(value: str) -> bool:
    return any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in value)


def boolean(value: Any, at: str) -> None:
    """Check for true or false.

    Example:
        >>> boolean(1, "amp")
        Traceback (most recent call last):
        torch_feather.training.content.ContentError: amp must be true or false, got 1
    """
    require(isinstance(value, bool), at, "true or false", value)


def tensor(value: Any, at: str) -> None:
    """Check for a dense tensor.

    Example:
        >>> tensor([1], "rng")
        Traceback (most recent call last):
        torch_feather.training.content.ContentError: rng must be a tensor, got list
    """
    require(isinstance(value, Tensor) and not value.is_sparse, at, "a tensor", value)


def scalar(value: Any, at: str) -> None:
    """Check for a tensor without dimensions.

    Example:
        >>> import torch
        >>> scalar(torch.ones(2), "loss")
        Traceback (most recent call last):
        torch_feather...ContentError: loss must be a tensor without dimensions, got (2,)
    """
    tensor(value, at)
    require(value.ndim == 0, at, "a tensor without dimensions", tuple(value.shape))


def anything(value: Any, at: str) -> None:
    """Accept any value.

    Example:
        >>> anything({"a": [1]}, "config")
    """


def nullable(check: Check) -> Check:
    """Return a check that also accepts None.

    Example:
        >>> nullable(text)(None, "commit")
    """
    return lambda value, at: None if value is None else check(value, at)


def items(check: Check, least: int = 0) -> Check:
    """Return a check for lists with at least `least` entries.

    Example:
        >>> items(integer())([1, "a"], "shape")
        Traceback (most recent call last):
        torch_feather.training.content.ContentError: shape[1] must be an integer, got 'a'
    """

    def check_all(value: Any, at: str) -> None:
        require(isinstance(value, list), at, "a list", value)
        require(len(value) >= least, at, f"a list of at least {least}", value)
        for i, item in enumerate(value):
            check(item, f"{at}[{i}]")

    return check_all


def mapping(check: Check) -> Check:
    """Return a check for mappings whose values pass `check`.

    Example:
        >>> mapping(text)({"torch": 2}, "versions")
        Traceback (most recent call last):
        torch_feather.training.content.ContentError: versions.torch must be text, got 2
    """

    def check_all(value: Any, at: str) -> None:
        require(isinstance(value, dict), at, "a mapping", value)
        for key, item in value.items():
            check(item, below(at, key))

    return check_all


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Return a check for mappings with given keys; further keys may hold anything.

    Example:
        >>> check = record({"zeros": integer()}, {"name": text})
        >>> check({"zeros": 3}, "")
        >>> try:
        ...     check({"zeros": 3, "name": 4}, "layer")
        ... except ContentError as error:
        ...     print(error)
        layer.name must be text, got 4
    """

    def check(value: Any, at: str) -> None:
        require(isinstance(value, dict), at, "a mapping", value)
        missing = [key for key in required if key not in value]
        if missing:
            raise ContentError(f"{at + ' ' if at else ''}lacks {', '.join(missing)}")
        for key, item in {**required, **(optional or {})}.items():
            if key in value:
                item(value[key], below(at, key))

    return check


def below(at: str, key: Any) -> str:
    """Return the position of an entry of a mapping.

    Example:
        >>> below("report", "zeros"), below("", "report")
        ('report.zeros', 'report')
    """
    return f"{at}.{shorten(key).strip(chr(39))}" if at else shorten(key).strip(chr(39))


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """Return the text of a regular file of limited size.

    Args:
        path: the file.
        most: largest size in bytes.

    Raises:
        FileNotFoundError: the file does not exist.
        ContentError: the file is larger, of another kind, not UTF-8, or cannot be read.

    Example:
        >>> read_text(Path("/dev/null"))
        Traceback (most recent call last):
        torch_feather.training.content.ContentError: not a regular file
    """
    try:
        # Not blocking: opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ContentError("not a regular file")
            content = file.read(most + 1)
        if len(content) > most:
            raise ContentError(f"larger than {most // 2**10} KiB")
        return content.decode()
    except UnicodeDecodeError as error:
        raise ContentError(str(error)) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ContentError(str(error.strerror)) from None


def parse_json(content: str) -> Any:
    """Return the value of a JSON text; NaN and infinities are accepted.

    Raises:
        ContentError: the text is not JSON, is nested too deeply, or has a number of thousands of
            digits.

    Example:
        >>> parse_json("[" * 100_000)
        Traceback (most recent call last):
        torch_feather.training.content.ContentError: nested too deeply
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ContentError("nested too deeply") from None
    except ValueError as error:
        raise ContentError(f"not valid JSON: {str(error).splitlines()[0]}") from None


def read_json(path: Path, check: Check, remedy: str) -> Any:
    """Return the checked content of a JSON file.

    Args:
        path: the file.
        check: checks the content.
        remedy: end of the message of an error: what to do, as sentences.

    Raises:
        FileNotFoundError: the file does not exist.
        RunError: the file cannot be read, or has other content.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.json"
        >>> _ = path.write_text("[1, 2]")
        >>> read_json(path, items(integer()), "Remove it.")
        [1, 2]
    """
    try:
        value = parse_json(read_text(path))
        check(value, "")
    except ContentError as error:
        raise RunError(f"{path}: cannot be used: {error}. {remedy}") from None
    return value


def read_json_lines(path: Path, check: Check, remedy: str) -> list[Any]:
    """Return the checked content of a file with one JSON value in each line.

    Args:
        path, check, remedy: as for `read_json`; `check` gets the list of all values.

    Raises:
        RunError: the file does not exist, cannot be read, or has other content.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.jsonl"
        >>> _ = path.write_text("1\\n2\\n")
        >>> read_json_lines(path, items(integer()), "Remove it.")
        [1, 2]
    """
    try:
        lines = read_text(path).splitlines()
        values = [_line(i, line) for i, line in enumerate(lines, 1)]
        check(values, "")
    except FileNotFoundError:
        raise RunError(f"{path}: no such file. {remedy}") from None
    except ContentError as error:
        raise RunError(f"{path}: cannot be used: {error}. {remedy}") from None
    return values


def _line(i: int, content: str) -> Any:
    try:
        return parse_json(content)
    except ContentError as error:
        raise ContentError(f"line {i}: {error}") from None


def same_names(found: Iterable[str], expected: Iterable[str], at: str) -> None:
    """Raise a ContentError that names the first missing or additional name.

    Example:
        >>> same_names(["a"], ["a"], "model")
    """
    found, expected = set(found), set(expected)
    for names, what in ((expected - found, "lacks"), (found - expected, "has an unknown entry")):
        if names:
            raise ContentError(f"{at} {what} {shorten(min(names, key=str)).strip(chr(39))}")
