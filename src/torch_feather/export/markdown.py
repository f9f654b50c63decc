"""Text in Markdown files."""

from __future__ import annotations

import re


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is: without HTML, cells, links and formatting.

    Numbers, hyphens and parentheses stay readable; a line break becomes a space.

    Example:
        >>> print(escape_markdown("<b>a|b</b> (θ = 0.5)"))
        &lt;b>a\\|b&lt;/b> (θ = 0.5)
    """
    text = "".join(character if character.isprintable() else " " for character in text)
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|])|(?<!\w)(_)|(_)(?!\w)", lambda match: "\\" + match[0], text)
