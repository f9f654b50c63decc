"""Run the tests within other libraries, and record versions and outcomes.

The table of docs/integrations.md names an example and tests for each library. This command runs
these tests in one process, and writes OUT.md and OUT.json. A test of a library that is not
installed is skipped, and its row says so.

    pip install -e '.[test,apps-large]' && pip install --no-deps litgpt
    python benchmarks/integrations.py --out results/integrations
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from torch_feather.training.provenance import provenance

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "integrations.md"
# The package of each example.
PACKAGES = {
    "accelerate_loop": "accelerate",
    "diffusers_unet": "diffusers",
    "fastai_learner": "fastai",
    "geometric_graph": "torch_geometric",
    "gpt_loop": "torch",
    "keras_model": "keras",
    "lightning_gan": "lightning",
    "lightning_module": "lightning",
    "litgpt_loop": "litgpt",
    "monai_segmentation": "monai",
    "peft_adapters": "peft",
    "skorch_classifier": "skorch",
    "timm_loop": "timm",
    "torchrl_dqn": "torchrl",
    "torchvision_detector": "torchvision",
    "transformers_trainer": "transformers",
    "ultralytics_trainer": "ultralytics",
    "whisper_trainer": "transformers",
}
HEADER = """# Sparse training within other libraries

    python benchmarks/integrations.py --out results/integrations

Each row is one of [docs/integrations.md](../docs/integrations.md), whose tests ran (their number).
*passed*: a resumed run equals an uninterrupted one bit for bit where the page says *exact*, and
what is delivered has exactly `round(s * N)` zeros. Seconds are those of all tests of the row,
imports included, on a machine that does other work too.

"""


@dataclass
class Row:
    """A library: its example, its tests, and what came of them."""

    name: str
    example: str
    tests: list[tuple[str, str]]  # file, function
    package: str = ""
    version: str = ""
    outcomes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def has(self, file: str, test: str) -> bool:
        """Return whether a test case, such as `test_a[gpt_loop]`, belongs to this row."""
        function, _, parameter = test.partition("[")
        if (file, function) not in self.tests:
            return False
        return file != "tests/examples/test_loops.py" or parameter == f"{self.example}]"

    @property
    def outcome(self) -> str:
        kinds = set(self.outcomes)
        for kind in ("failed", "skipped", "passed"):
            if kind in kinds:
                return f"{kind} ({len(self.outcomes)})"
        return "not run"


def rows(page: str) -> list[Row]:
    """Return the rows of the table of a page."""
    found = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        examples = re.findall(r"\.\./examples/(\w+)\.py", line)
        if len(cells) != 7 or not examples:
            continue
        tests = [
            (file, test)
            for file, names in re.findall(r'\]\(\.\./(\S+) "([\w ]+)"\)', cells[-1])
            for test in names.split()
        ]
        # Every example with a loop of its own is run too.
        if any(file == "tests/examples/test_loops.py" for file, _ in tests):
            tests.append(("tests/examples/test_loops.py", "test_the_example_runs"))
        found.append(Row(cells[0], examples[0], tests))
    return found


def add_outcomes(found: list[Row], report: str) -> None:
    """Add the test cases of a JUnit report to their rows."""
    for case in ET.fromstring(report).iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        kind = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        outcome = next((kind[child.tag] for child in case if child.tag in kind), "passed")
        for row in found:
            if row.has(file, case.get("name", "")):
                row.outcomes.append(outcome)
                row.seconds += float(case.get("time", 0))


def run_tests(found: list[Row], python: str) -> str:
    """Run the tests of all rows, and return the JUnit report."""
    files = sorted({file for row in found for file, _ in row.tests})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-n", "0", "-m", "apps or not apps", f"--junitxml={report}"]
        subprocess.run([python, "-m", "pytest", *options, *files], cwd=ROOT, check=False)
        return report.read_text()


def table(found: list[Row], facts: dict) -> str:
    """Return the page."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    hardware = f"{facts['hardware']['cpu']}, {facts['hardware']['cores']} cores"
    lines = [
        f"{HEADER}{facts['date']}; {versions}; {hardware}; commit {str(facts['commit'])[:10]}.",
        "",
        "| with | package | version | tests | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        cells = [row.name, row.package, row.version, row.outcome, f"{row.seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="OUT.md and OUT.json are written")
    out = parser.parse_args().out
    facts = {"date": date.today().isoformat(), **provenance(torch.device("cpu"))}
    found = rows(PAGE.read_text())
    add_outcomes(found, run_tests(found, sys.executable))
    for row in found:
        row.package = PACKAGES[row.example]
        try:
            row.version = version(row.package).partition("+")[0]
        except PackageNotFoundError:
            row.version = "not installed"
    out.with_suffix(".md").write_text(table(found, facts))
    record = {**facts, "rows": [asdict(row) for row in found]}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
