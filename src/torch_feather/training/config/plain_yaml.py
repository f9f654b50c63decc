"""YAML of settings files: bounded in size and depth, without aliases, tags and repeated keys."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigurationError

MAX_BYTES = 128 * 1024
MAX_DEPTH = 16
# YAML also reads dates, `<<` and `=`; in settings they are text.
PLAIN_TAGS = tuple(
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")
)


class _Loader(yaml.SafeLoader):
    """Reads null, booleans, numbers, text, lists and mappings with text as keys."""

    depth = 0
    yaml_implicit_resolvers = {  # noqa: RUF012  (as in yaml.SafeLoader)
        first: [(tag, pattern) for tag, pattern in found if tag in PLAIN_TAGS]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem=f"aliases such as *{event.anchor} are not supported; write the value out",
                problem_mark=mark,
            )
        if getattr(event, "tag", None) not in (None, "!", *PLAIN_TAGS):
            raise yaml.MarkedYAMLError(
                problem=f"the tag {event.tag} is not supported", problem_mark=mark
            )
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=mark
            )
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if key.tag != PLAIN_TAGS[4]:
                raise yaml.MarkedYAMLError(
                    problem="a key must be text; write it in quotes", problem_mark=key.start_mark
                )
            if name in found:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {name!r} occurs twice", problem_mark=key.start_mark
                )
            found.add(name)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ConfigurationError: the text is not YAML, or more than plain, small YAML; the message has no
            source.

    Example:
        >>> parse_yaml("epochs: 3")
        {'epochs': 3}
        >>> try:
        ...     parse_yaml("a: &a [1]\\nb: *a")
        ... except ConfigurationError as error:
        ...     print(error)
        line 2: aliases such as *a are not supported; write the value out
    """
    if len(text) > MAX_BYTES:
        raise ConfigurationError(f"larger than {MAX_BYTES // 1024} KiB")
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or (str(error).splitlines() or ["?"])[0]
        kind = "" if type(error) is yaml.MarkedYAMLError else "not valid YAML: "
        raise ConfigurationError(f"{position}{kind}{problem}") from None
    except (ValueError, RecursionError, AttributeError) as error:  # such as 1e, or 5,000 digits
        raise ConfigurationError(f"not valid YAML: {str(error).splitlines()[0]}") from None


def read_small_text(path: Path) -> str:
    """Return the text of a settings file.

    Raises:
        ConfigurationError: the file does not exist, is not a regular file, is too large, or is not
            UTF-8.

    Example:
        >>> try:
        ...     read_small_text(Path("/dev/null"))
        ... except ConfigurationError as error:
        ...     print(error)
        /dev/null: not a regular file
    """
    try:
        # Not blocking: opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigurationError(f"{path}: not a regular file")
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigurationError(f"{path}: larger than {MAX_BYTES // 1024} KiB")
        return content.decode()
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: not valid YAML: {error}") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from None
