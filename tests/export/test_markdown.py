import re

import pytest

from torch_feather.export.markdown import escape_markdown

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "a|b",
    "[text](https://example.org)",
    "![image](x)",
    "`code`",
    "**bold** and *italic*",
    "_x_",
    "&lt;script&gt;",
    "two\nlines",
    "\\|",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_name_is_shown_as_it_is(text):
    """Undoing the escapes of Markdown and HTML gives the text; no active character is left."""
    escaped = escape_markdown(text)
    active = re.sub(r"\\.", "", escaped)
    assert not re.search(r"[`*\[\]|<\n]", active)
    shown = re.sub(r"\\(.)", r"\1", escaped).replace("&lt;", "<").replace("&amp;", "&")
    assert shown == text.replace("\n", " ")


def test_ordinary_text_is_unchanged():
    text = "feather (p = 3): 45.09 ± 0.12, lr_multiplier = 0.5, 12,345 / 67,890, −2.0 to +1.5"
    assert escape_markdown(text) == text
