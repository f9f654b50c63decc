"""The documentation's Python runs as it stands, and what it names exists."""

import itertools
import re
import tomllib
from pathlib import Path

import pytest
from test_structure import ABOVE_THE_CORE

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
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
WITH_TESTS = [
    page
    for folder in (".", "benchmarks", "docs", "results")
    for page in sorted((ROOT / folder).glob("*.md" if folder == "." else "**/*.md"))
]
SRC = ROOT / "src" / "torch_feather"
DESIGN = ROOT / "docs" / "design.md"
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


def test_no_column_of_a_table_lacks_a_heading():
    """Screen readers cannot announce an empty heading."""
    empty = [
        (str(page.relative_to(ROOT)), header)
        for page in WITH_TESTS
        for header in re.findall(r"^\|(.+)\|\n\|[ :|-]+\|$", page.read_text(), re.MULTILINE)
        if not all(cell.strip() for cell in header.split("|"))
    ]
    assert empty == []


def names_of_tests(file: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)


def test_every_answer_can_be_run():
    """By its snippet, or by a test that it names."""
    all_tests = {name for file in TESTS for name in names_of_tests(file)}
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
    count = 0
    for begin in tables:
        rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[begin + 2 :]))
        assert rows
        count += len(rows)
        for row in rows:
            found = re.findall(r'\]\((\S+) "([\w ]+)"\)', row.split("|")[-2])
            assert found, row
            for file, tests in found:
                unknown = set(tests.split()) - set(names_of_tests(page.parent / file))
                assert not unknown, (file, unknown)
    assert count >= 30


@pytest.mark.parametrize("page", [page.relative_to(ROOT) for page in WITH_TESTS], ids=str)
def test_the_tests_that_a_page_names_exist(page):
    """As `test_name`, `tests/file.py` or `tests/file.py::test_name`."""
    text = (ROOT / page).read_text()
    files = set(re.findall(r"\btests/[\w/]+\.py\b", text))
    assert {file for file in files if not (ROOT / file).exists()} == set()
    in_files = re.findall(r"\b(tests/[\w/]+\.py)::(test_\w+)", text)
    assert [(f, name) for f, name in in_files if name not in names_of_tests(ROOT / f)] == []
    all_tests = {name for file in TESTS for name in names_of_tests(file)}
    metrics = {"test_acc", "test_accuracy", "test_f1", "test_loss", "test_bits_per_character"}
    assert set(re.findall(r"`(test_\w+)`", text)) - metrics - all_tests == set()


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
    measured = "([measured](../../results/README.md#of-every-method-version-01))"
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
    assert whole in snippets(DESIGN)


def core_in_the_design() -> list[tuple[str, str]]:
    """Folder and file of each file of the core that the tree of design.md names, in its order."""
    (tree,) = re.findall(
        r"^-+ the core: .*?\n(.+?)^```", DESIGN.read_text(), re.DOTALL | re.MULTILINE
    )
    found, part = [], ""
    for line in tree.splitlines():
        folder = part = part if line.startswith(" ") else ""
        for word in line.split():
            if re.fullmatch(r"\w+/", word):
                folder += word
                part = part if line.startswith(" ") else folder
            elif re.fullmatch(r"\w+\.py", word):
                found.append((folder, word))
            else:
                break
    return found


def test_the_design_names_every_file_of_the_core_and_no_other():
    named = [folder + file for folder, file in core_in_the_design()]
    core = {
        path.relative_to(SRC).as_posix()
        for path in SRC.rglob("*.py")
        if path.relative_to(SRC).parts[0] not in ABOVE_THE_CORE
        and (path.name != "__init__.py" or path.parent == SRC)
    }
    assert set(named) - core == set(), "design.md names files that do not exist"
    assert core - set(named) == set(), "design.md lacks files of the core"
    assert len(named) == len(set(named))


def test_the_design_lists_the_parts_of_the_core_from_top_to_bottom():
    """As [tool.importlinter] has them, which checks the imports."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [re.split(r" [|:] ", layer) for layer in settings["contracts"][0]["layers"]]
    depth = {part: i for i, layer in enumerate(layers) for part in layer}
    parts = [
        (folder or file).partition("/")[0].removesuffix(".py")
        for folder, file in core_in_the_design()
    ]
    depths = [depth[part] for part in parts if part != "__init__"]
    assert len(depths) > 20
    assert depths == sorted(depths)
