"""HTML pages that need no other file and no network; `page.css` and `tables.js` are their base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jinja2
from markupsafe import Markup


def render_page(package: str, name: str, **values: Any) -> str:
    """Return the page of a template. Values are escaped.

    Args:
        package: the package that holds the template.
        name: its file. It may include `page.css` and `tables.js`.
        values: the values that the template names.

    Example:
        >>> page = render_page(__package__, "page.css")
        >>> "prefers-color-scheme: dark" in page
        True
    """
    loaders = [jinja2.PackageLoader(one, ".") for one in dict.fromkeys((package, __package__))]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name).render(**values)


def inline_svgs(svgs: Mapping[str, str]) -> dict[str, Markup]:
    """Return SVG files as elements of one page, on which their ids are unique.

    Args:
        svgs: texts of the files, by names, which become prefixes of their ids.

    Example:
        >>> print(inline_svgs({"a": '<?xml version="1.0"?><svg><g id="x"/></svg>'})["a"])
        <svg><g id="a-x"/></svg>
    """
    found = {}
    for name, svg in svgs.items():
        svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
        found[name] = Markup(svg[svg.index("<svg") :])
    return found
