"""The documentation's Python runs as it stands, and what it names exists."""

import re
from pathlib import Path

import pytest

import torch_feather as feather
from torch_feather import allocation
from torch_feather.methods import method_options
from torch_feather.methods.method import ALLOCATIONS, SCHEDULES

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods"
PAGES = {
    str(page.relative_to(ROOT)): page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
SNIPPETS = [
    pytest.param(block, id=f"{name}-{i}")
    for name, page in PAGES.items()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "snippet", "exec"), {})


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_links_lead_somewhere(page):
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", page.read_text()):
        other = page.parent / target if target else page
        assert other.exists(), target
        if heading and other.suffix == ".md":
            assert heading in headings(other), (target, heading)


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


def test_every_allocation_and_schedule_is_described():
    allocations = section(METHODS / "README.md", "Allocations")
    objects = set(allocation.__all__) - {"Allocation"}
    assert all(f"`{name}`" in allocations for name in ALLOCATIONS)
    assert all(f"`{name}(" in allocations for name in objects)
    schedules = section(METHODS / "README.md", "Schedules")
    assert all(f"`{name}`" in schedules for name in SCHEDULES)
