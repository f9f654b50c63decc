"""The documentation's Python runs as it stands, and what it names exists."""

import itertools
import re
from pathlib import Path

import pytest

import torch_feather as feather
from torch_feather import allocation
from torch_feather.methods import method_options
from torch_feather.methods.options import ALLOCATIONS, SCHEDULES

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods"
PAGES = {
    str(page.relative_to(ROOT)): page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
FAQ, COMPATIBILITY = ROOT / "docs" / "faq.md", ROOT / "docs" / "compatibility.md"
RELIABILITY = ROOT / "docs" / "reliability.md"


def snippets(page: Path) -> list[str]:
    """What the page shows in Python; answers go on from the first snippet of theirs."""
    first, *others = [*re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL), ""]
    return [first, *(first + other if page == FAQ else other for other in others)]


SNIPPETS = [
    pytest.param(block, id=f"{name}-{i}")
    for name, page in PAGES.items()
    for i, block in enumerate(snippets(page))
    if block
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "snippet", "exec"), {})


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_lead_somewhere(page):
    for target, heading in re.findall(
        r'\]\(([^)#: ]*)(?:#([^)]+))?(?: "[\w ]+")?\)', page.read_text()
    ):
        other = page.parent / target if target else page
        assert other.exists(), target
        if heading and other.suffix == ".md":
            assert heading in headings(other), (target, heading)


def names_of_tests(file: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)


def test_every_answer_can_be_run():
    """By its snippet, or by a test that it names."""
    all_tests = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in names_of_tests(file)
    }
    _, *answers = re.split(r"^## ", FAQ.read_text(), flags=re.MULTILINE)
    for answer in answers:
        named = set(re.findall(r"`(test_\w+)`", answer))
        assert named <= all_tests
        assert named or "```python" in answer or "](compatibility.md)" in answer, answer


@pytest.mark.parametrize("page", [COMPATIBILITY, RELIABILITY], ids=lambda page: page.name)
def test_every_line_of_a_table_of_tests_leads_to_its_tests(page):
    """In each table whose last column is named Tests."""
    lines = page.read_text().splitlines()
    tables = [i for i, line in enumerate(lines) if re.search(r"\| ?Tests ?\|$", line)]
    assert tables
    for begin in tables:
        rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[begin + 2 :]))
        assert rows
        for row in rows:
            found = re.findall(r'\]\((\S+) "([\w ]+)"\)', row.split("|")[-2])
            assert found, row
            for file, tests in found:
                unknown = set(tests.split()) - set(names_of_tests(page.parent / file))
                assert not unknown, (file, unknown)


def headings(page: Path) -> set[str]:
    """Anchors of a page, as they are made on the web."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


def section(page: Path, heading: str) -> str:
    found = re.search(
        rf"^## {heading}\n(.+?)(?=^## |\Z)", page.read_text(), re.DOTALL | re.MULTILINE
    )
    assert found, f"{page.name} has no section {heading}"
    return found[1]


@pytest.mark.parametrize("name", feather.available_methods())
def test_every_method_has_a_page_that_names_its_options_and_where_they_come_from(name):
    page = METHODS / f"{name}.md"
    assert page.read_text().startswith(f"# `{name}`\n")
    assert "    " in section(page, "Formulas")
    assert section(page, "Source").strip()
    measured = "([measured](../../results/README.md#of-every-method))"
    assert measured in section(page, "When to use it")
    defaults = section(page, "Defaults")
    assert [option for option in method_options(name) if f"`{option}`" not in defaults] == []


def test_the_index_names_every_method_and_links_every_page():
    index = (METHODS / "README.md").read_text()
    assert all(f"`{name}`" in index for name in feather.available_methods())
    for page in METHODS.glob("*.md"):
        assert page.stem == "README" or f"[`{page.stem}`]({page.name})" in index


def test_the_reference_has_every_public_name():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.rst"))
    listed = set(re.findall(r":: torch_feather\.(\w+)$", pages, re.MULTILINE))
    assert {"errors", "models"} <= listed  # all of them
    assert set(feather.__all__) - set(dir(feather.errors)) <= listed


def test_every_allocation_and_schedule_is_described():
    allocations = section(METHODS / "README.md", "Allocations")
    objects = set(allocation.__all__) - {"Allocation"}
    assert all(f"`{name}`" in allocations for name in ALLOCATIONS)
    assert all(f"`{name}(" in allocations for name in objects)
    schedules = section(METHODS / "README.md", "Schedules")
    assert all(f"`{name}`" in schedules for name in SCHEDULES)


@pytest.mark.parametrize("name", ["powerprop", "annealed_theta", "rigl"])
def test_the_design_shows_the_examples_of_methods_as_they_are(name):
    whole = (ROOT / "examples" / "methods" / f"{name}.py").read_text()
    assert whole in snippets(ROOT / "docs" / "design.md")
