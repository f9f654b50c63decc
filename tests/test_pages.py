"""Pages of studies and of the site in a real browser: both schemes, a desk and a phone.

    pip install '.[test,docs,browser]'
    python -m pytest -m apps tests/test_pages.py

Chromium is that of the system (`apt-get install chromium`), or of `playwright install chromium`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUDIES = {
    "compare": ROOT / "results" / "compare-small" / "index.html",
    "flops": ROOT / "results" / "flops-small" / "index.html",
}
SITE = (
    *("README", "docs/quickstart", "docs/choose_method", "docs/choose_sparsity", "docs/deploy"),
    *("docs/migrate", "docs/troubleshooting", "docs/compatibility", "results/README"),
)
PAGES = [*STUDIES, *SITE]
WIDTHS = {"desk": 1280, "phone": 375}

pytestmark = pytest.mark.apps


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("furo")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "-c", "docs", ".", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    return out


@pytest.fixture
def visit(browser, request):
    contexts = []

    def open_page(name, scheme="light", width=1280):
        """Returns the page and the errors of its console, which may still grow."""
        file = STUDIES.get(name) or request.getfixturevalue("site") / f"{name}.html"
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        page, errors = context.new_page(), []
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(file.as_uri())
        return page, errors

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_no_errors_fits_the_width_and_follows_the_scheme(visit, name, scheme, width):
    page, errors = visit(name, scheme, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"
    brightness = sum(page.evaluate(background)[:3]) / 3
    assert brightness < 60 if scheme == "dark" else brightness > 240
    sideways = """[...document.querySelectorAll("main *, article *")].filter(e =>
        e.scrollWidth > e.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(e).overflowX))
        .map(e => e.tagName + "." + e.className)"""
    if width == WIDTHS["phone"]:
        assert page.evaluate(sideways) == []
    assert len(page.screenshot(full_page=True)) > 20_000
    assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_fault_of_accessibility(visit, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page, _ = visit(name, scheme)
    part = "body" if name in STUDIES else "article"  # not the theme's navigation
    found = axe.Axe().run(page, context=part).response["violations"]
    faults = {fault["id"]: [node["html"][:200] for node in fault["nodes"]] for fault in found}
    assert faults == {}


@pytest.mark.parametrize(("name", "column"), [("compare", 2), ("README", 0)])
def test_a_header_sorts_its_table_with_mouse_and_keyboard(visit, name, column):
    page, _ = visit(name)
    table = page.locator("table").first
    button = table.locator("thead th").nth(column).locator("button")

    def cells():
        texts = table.locator(f"tbody tr td:nth-child({column + 1})").all_inner_texts()
        texts = [text.strip() for text in texts]
        return [float(t.split()[0]) for t in texts] if name == "compare" else texts

    before = sorted(cells())
    button.click()
    first = cells()
    button.focus()
    page.keyboard.press("Enter")
    assert {tuple(first), tuple(cells())} == {tuple(before), tuple(before[::-1])}
    assert table.locator("thead th").nth(column).get_attribute("aria-sort") in (
        *("ascending", "descending"),
    )
