"""The files that accompany a library: header, examples, CMake file; filled in from `templates`."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Iterable
from importlib.resources import files

from ..errors import ConfigurationError
from .program import Program

# Words of C and C++ that a library may not have as its name, beside Python's own.
RESERVED = {
    *("auto", "bool", "char", "const", "delete", "do", "double", "enum", "example"),
    *("extern", "float", "inline", "int", "long", "main", "new", "register", "restrict"),
    *("short", "signed", "static", "struct", "switch", "template", "this", "typedef"),
    *("union", "unsigned", "virtual", "void"),
}


def check_name(name: str) -> None:
    """Check that a name can be the prefix of C functions.

    Raises:
        ConfigurationError: it cannot.

    Example:
        >>> check_name("model")
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,62}", name, re.ASCII) or name in {
        *RESERVED,
        *keyword.kwlist,
    }:
        raise ConfigurationError(
            f"name must be a C identifier of lowercase letters, digits and _, got {name!r}."
        )


def fill(template: str, program: Program, name: str, **more: object) -> str:
    """Return the text of a template with its names and sizes.

    Args:
        template: name of the template.
        program: the network.
        name: prefix of the functions.
        more: further values, by their names in lower case.

    Example:
        >>> "net_run(" in fill("model.h", Program(1), "net")
        True
    """
    sizes = "\n".join(_sizes(program, name.upper()))
    values = {
        "NAME": name,
        "UPPER": name.upper(),
        "GUARD": f"{name.upper()}_H",
        "INPUTS": len(program.inputs),
        "OUTPUTS": len(program.outputs),
        "SIZES": sizes,
        **{key.upper(): value for key, value in more.items()},
    }
    return template_text(template, **values)


def template_text(template: str, **values: object) -> str:
    """Return the text of a template with its values.

    Args:
        template: name of the template.
        values: by name, in capital letters; a template has them between @.

    Example:
        >>> "<title>Digits</title>" in template_text("web_page.html", TITLE="Digits")
        True
    """
    text = files(__package__).joinpath("templates", template).read_text("utf-8")
    return re.sub(r"@([A-Z]+)@", lambda m: str(values[m[1]]), text)


def _sizes(program: Program, upper: str) -> Iterable[str]:
    for kind, views in (("INPUT", program.inputs), ("OUTPUT", program.outputs)):
        for i, view in enumerate(views):
            shape = " x ".join(map(str, view.shape)) or "one number"
            yield f"#define {upper}_{kind}_{i}_SIZE {math.prod(view.shape)} /* {shape} */"
