"""Run tests on a seeded sample of the mutants that mutmut makes, and list those not killed.

`mutmut run NAME` once makes all mutants and finds the tests that call each function. Then, in the
environment of mutmut:

    python benchmarks/mutation.py sample --count 160 --seed 0
    python benchmarks/mutation.py run --minutes 60
    python benchmarks/mutation.py report

`sample` also keeps, for each function, one set of parameters per test (drawn with the same seed),
and only tests of at most `--seconds`. Mutants that change only a text with a space (a message) are
left out. `run` forks a process per mutant, so that tests are imported and collected once. It first
runs all tests on the unchanged source. Called again, it continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

# Tests whose warnings are attributed to the wrapper of mutmut, which is a frame of its own.
DESELECTED = (
    "tests/conformance/test_exactness.py::"
    "test_a_layer_that_begins_empty_is_reported_by_name_and_file",
)


def mutants(folder: Path) -> dict[str, Path]:
    """Return the file of each mutant."""
    return {
        name: path.with_suffix("")
        for path in sorted(folder.glob("src/**/*.meta"))
        for name in json.loads(path.read_text())["exit_code_by_key"]
    }


def body(source: str, name: str) -> list[str] | None:
    """Return the lines of the function `name`, after its signature, in a file that mutmut wrote."""
    at = re.search(rf"^( *)(?:async )?def {re.escape(name)}\(", source, re.MULTILINE)
    if at is None:
        return None
    lines = source[at.start() :].split("\n")
    end = re.compile(rf" {{0,{len(at[1])}}}[^\s)]")
    return lines[1 : next((i for i, line in enumerate(lines) if i and end.match(line)), None)]


def change(path: Path, mutant: str) -> tuple[str, str]:
    """Return the code before and after the change of a mutant, empty if it is not found."""
    source = path.read_text()
    name = mutant.rpartition(".")[2]
    before = body(source, re.sub(r"__mutmut_\d+$", "__mutmut_orig", name))
    after = body(source, name)
    if before is None or after is None:
        return "", ""
    start = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    ends = zip(before[::-1], after[::-1], strict=False)
    end = next((i for i, (a, b) in enumerate(ends) if a != b), 0)
    return tuple(" ".join(" ".join(x[start : len(x) - end]).split()) for x in (before, after))  # type: ignore[return-value]


def is_message(before: str, after: str) -> bool:
    """Return whether only a text with a space changed, such as that of an error."""
    texts = re.compile(r"""f?"[^"]* [^"]*"|f?'[^']* [^']*'""")
    return before != after and texts.sub("", before) == texts.sub("", after)


def sample(folder: Path, count: int, seed: int, seconds: float) -> None:
    """Draw mutants, and the tests of each, the fastest first."""
    draw = random.Random(seed)
    stats = json.loads((folder / "mutmut-stats.json").read_text())
    duration = stats["duration_by_test"]
    tests_of = stats["tests_by_mangled_function_name"]
    for function in sorted(tests_of):
        by_test: dict[str, list[str]] = {}
        for test in sorted(tests_of[function]):
            if duration[test] <= seconds and not test.startswith(DESELECTED):
                by_test.setdefault(test.partition("[")[0], []).append(test)
        chosen_tests = [draw.choice(each) for each in by_test.values()]
        tests_of[function] = sorted(chosen_tests, key=duration.__getitem__)
    names = mutants(folder)
    order = draw.sample(sorted(names), len(names))
    chosen: dict[str, list[str]] = {}
    for name in order:
        covered = tests_of.get(re.sub(r"__mutmut_\d+$", "", name))
        if len(chosen) < count and covered and not is_message(*change(names[name], name)):
            chosen[name] = covered
    (folder / "sample.json").write_text(json.dumps(chosen))
    (folder / "verdicts.json").write_text("{}")


class Sample:
    """Runs collected tests on each mutant of a sample; a plugin of pytest."""

    def __init__(self, chosen: dict[str, list[str]], verdicts: Path, end: float, limit: float):
        self.chosen, self.verdicts, self.end, self.limit = chosen, verdicts, end, limit

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        found = json.loads(self.verdicts.read_text())
        if not found and self.verdict(session, "", session.items, math.inf) != "survived":
            pytest.exit("A test fails on the unchanged source.", 1)
        for number, (name, tests) in enumerate(self.chosen.items()):
            if name not in found and time.monotonic() < self.end:
                tests_of = [items[test] for test in tests]
                found[name] = self.verdict(session, name, tests_of, self.limit)
                self.verdicts.write_text(json.dumps(found))
                print(number, name, found[name], file=sys.__stderr__, flush=True)
        return True

    def verdict(
        self, session: pytest.Session, mutant: str, items: list[pytest.Item], limit: float
    ) -> str:
        """Run tests on one mutant in a process of its own, up to the first failure."""
        child = os.fork()
        if child == 0:
            os.environ["MUTANT_UNDER_TEST"] = mutant
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.testsfailed:
                    os._exit(1)
            os._exit(0)
        end = time.monotonic() + limit
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                return {0: "survived", 1: "killed"}.get(code, f"exit code {code}")
            time.sleep(0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "timed out"


def run(folder: Path, minutes: float, limit: float) -> None:
    """Run the sample, as far as it has not been run; the unchanged source first."""
    chosen = json.loads((folder / "sample.json").read_text())
    os.chdir(folder)
    sys.path.insert(0, str(Path.cwd() / "src"))
    every = sorted({test for tests in chosen.values() for test in tests})
    plugin = Sample(chosen, Path("verdicts.json"), time.monotonic() + 60 * minutes, limit)
    # Marks would leave out every n-th of the collected tests, see tests/thinned.py.
    options = ["-q", "-n0", "-m", "", "-p", "no:cacheprovider", "--rootdir=."]
    pytest.main([*options, *every], [plugin])


def report(folder: Path) -> str:
    """Return Markdown tables of the sample: counts, and mutants that were not killed."""
    rows: list[str] = []
    counts: Counter[str] = Counter()
    verdicts, files = json.loads((folder / "verdicts.json").read_text()), mutants(folder)
    for name, result in sorted(verdicts.items()):
        path = files[name]
        counts[result] += 1
        if result == "killed":
            continue
        before, after = change(path, name)
        file = path.relative_to(folder)
        lines = file.read_text().split("\n")
        function = re.sub(r"__mutmut_\d+$", "", name.rpartition(".")[2])
        function = function.split("ǁ")[-1].removeprefix("x_")
        first = next((i for i, s in enumerate(lines, 1) if re.search(rf"def {function}\(", s)), 0)
        line = next(
            (
                i
                for i, s in enumerate(lines, 1)
                if i >= first and s.strip() and before.startswith(s.strip())
            ),
            first,
        )
        where = f"{file.as_posix().removeprefix('src/torch_feather/')}:{line}"
        rows.append(f"| `{where}` | `{before}` | `{after}` | {result} | |")
    head = [f"| {result} | {n} |" for result, n in sorted(counts.items())]
    table = ["", "| place | code | mutant | result | verdict |", "|---|---|---|---|---|", *rows]
    return "\n".join(["| result | mutants |", "|---|---|", *head, *table])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("sample", "run", "report"))
    parser.add_argument("--folder", type=Path, default=Path("mutants"))
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--minutes", type=float, default=60.0, help="no mutant begins later")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one mutant")
    options = parser.parse_args()
    if options.action == "report":
        print(report(options.folder))
    elif options.action == "run":
        run(options.folder, options.minutes, options.limit)
    else:
        sample(options.folder, options.count, options.seed, options.seconds)


if __name__ == "__main__":
    main()
