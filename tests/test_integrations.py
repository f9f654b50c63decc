"""The table of docs/integrations.md says what its examples and the last recorded run say."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "integrations.md").read_text()
RECORD = json.loads((ROOT / "results" / "integrations.json").read_text())
EXAMPLES = ROOT / "examples"


def load_benchmark():
    spec = importlib.util.spec_from_file_location(
        "integrations", ROOT / "benchmarks" / "integrations.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["integrations"] = module
    spec.loader.exec_module(module)
    return module


benchmark = load_benchmark()
ROWS = benchmark.rows(PAGE)
CELLS = {
    row.example: [cell.strip() for cell in line.strip("|").split("|")]
    for row in ROWS
    for line in PAGE.splitlines()
    if f"examples/{row.example}.py" in line
}


def test_every_example_of_training_within_a_library_has_a_row():
    named = {row.example for row in ROWS}
    found = {f.stem for f in EXAMPLES.glob("*.py") if "feather.sparsify(" in f.read_text()}
    assert named == found == set(benchmark.PACKAGES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.example)
def test_every_row_names_tests_that_exist(row):
    assert row.tests
    for file, test in row.tests:
        text = (ROOT / file).read_text()
        assert f"def {test}(" in text
        assert not file.endswith("test_loops.py") or f'    "{row.example}": (' in text


@pytest.mark.parametrize("example", sorted(CELLS))
def test_the_new_statements_are_those_that_the_example_marks(example):
    marks = re.findall(r"# new$", (EXAMPLES / f"{example}.py").read_text(), re.MULTILINE)
    assert CELLS[example][2] == str(len(marks))


def test_the_page_has_the_versions_of_the_last_record_in_which_every_test_passed():
    recorded = {row["example"]: row for row in RECORD["rows"]}
    assert {name: cells[1] for name, cells in CELLS.items()} == {
        name: row["version"] for name, row in recorded.items()
    }
    assert {outcome for row in RECORD["rows"] for outcome in row["outcomes"]} == {"passed"}
    assert all(row["outcomes"] for row in RECORD["rows"])


def test_outcomes_are_those_of_the_tests_of_a_row():
    row = benchmark.Row("one", "gpt_loop", [("tests/examples/test_loops.py", "test_a")])
    case = (
        '<testcase classname="tests.examples.test_loops" name="test_a[{}]" time="2">{}</testcase>'
    )
    cases = [case.format("gpt_loop", ""), case.format("other", "<failure/>")]
    benchmark.add_outcomes([row], f"<testsuite>{''.join(cases)}</testsuite>")
    assert (row.outcome, row.seconds) == ("passed (1)", 2.0)
    skipped = case.format("gpt_loop", "<skipped/>")
    benchmark.add_outcomes([row], f"<testsuite>{skipped}</testsuite>")
    assert row.outcome == "skipped (2)"
