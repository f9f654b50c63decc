"""The documentation site: `sphinx-build --fail-on-warning -c docs . build/site`.

Its root is that of the repository, so that a link between README, docs/, results/ and benchmarks/
is the same on the site as in the files. The README is the front page.
"""

import re
from pathlib import Path

project = "torch-feather"
copyright = "the torch-feather authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("docs/**", "results/**", "benchmarks/README.md"),
]
exclude_patterns = ["docs/_static", ".*", "build", "runs", "data"]

myst_heading_anchors = 4
highlight_language = "text"

# Names in docstrings become links where they are documented, and are code elsewhere.
default_role = "py:obj"
suppress_warnings = ["ref.python"]  # `.sparse` is that of several classes
autodoc_member_order = "bysource"
autodoc_default_options = {"special-members": "__call__"}
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Filters": "Filters"}
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_use_rtype = False

html_theme = "furo"
html_title = "torch-feather"
html_static_path = ["_static", "../src/torch_feather/analysis/tables.js"]
html_css_files = ["site.css"]
html_js_files = [("tables.js", {"defer": "defer"})]  # also in the pages of studies
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = False

# What stands beside each page, in the order of reading. A page that is missing here is an error.
NAVIGATION = {
    "README": {
        "Start": [
            "docs/quickstart",
            "docs/finetune_images",
            "Put it in your loop <docs/frameworks>",
            "docs/integrations",
            "docs/choose_method",
            "docs/choose_sparsity",
            "docs/deploy",
            "docs/migrate",
        ],
        "Help": ["docs/troubleshooting", "docs/faq", "docs/compatibility"],
        "Guides": [
            "docs/targets",
            "docs/patterns",
            "docs/finetuning",
            "docs/training",
            "docs/multi_label",
            "docs/files",
            "docs/runtime",
            "docs/native",
            "docs/scale",
        ],
        "Methods": ["docs/methods/README"],
        "Studies and results": [
            *(
                "docs/studies",
                "docs/protocol",
                "results/README",
                "docs/reliability",
                "benchmarks/README",
            ),
        ],
        "Reference": ["docs/reference/index", "docs/design", "CONTRIBUTING", "CHANGELOG"],
    },
    "docs/methods/README": {"": ["*"]},
    "results/README": {
        "": [
            "claims",
            "own_methods",
            "finetune_images",
            "known_networks",
            "restructuring",
            "mutation",
            "authors_code",
            "web",
            "fuzzing",
            "integrations",
            "*/table",
        ]
    },
}


def add_navigation(app, docname, source):
    """Appends to a page what stands below it; in the repository it is read without."""
    if docname.endswith("/table"):  # which is a part of a report, without a title
        source[0] = f"# {docname.split('/')[-2]}\n\n{source[0]}"
    for caption, pages in NAVIGATION.get(docname, {}).items():
        options = [":hidden:", ":glob:", *([f":caption: {caption}"] if caption else [])]
        source[0] += "\n".join(["\n\n```{toctree}", *options, "", *pages, "```\n"])


def read_as_markdown(app, what, name, obj, options, lines):
    """Docstrings are plain text: `|w|` is a magnitude, and what is indented is meant as it is."""
    text = "\n".join(lines)
    text = re.sub(r"`[^`]*`|\|", lambda m: "\\|" if m[0] == "|" else m[0], text)
    lines[:] = re.sub(r"(?m)(^\S.*\n)\n(?= {4})", r"\1\n::\n\n", text).split("\n")


def add_front_door(app, error):
    """The address of the site leads to the front page."""
    if error is None and app.builder.name == "html":
        page = '<!doctype html><meta http-equiv="refresh" content="0; url=README.html">\n'
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app):
    """Sphinx asks for it."""
    app.connect("source-read", add_navigation)
    app.connect("autodoc-process-docstring", read_as_markdown, priority=400)
    app.connect("build-finished", add_front_door)
