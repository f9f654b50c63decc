"""Draw a seeded sample of mutants and shorten their tests; summarize a mutation run of mutmut.

`mutmut run NAME` once makes all mutants and finds the tests that call each function. Then:

    mutmut run --max-children 1 $(python benchmarks/mutation.py sample --count 160 --seed 0)
    python benchmarks/mutation.py report

`sample` also keeps, for each function, one set of parameters per test (drawn with the same seed),
and only tests of at most `--seconds`. Mutants that change only a text with a space (a message) are
left out.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

RESULTS = {
    None: "not run", 0: "survived", 1: "killed", 3: "killed", 5: "no tests", 33: "no tests",
    24: "timed out", -24: "timed out", 36: "timed out", 152: "timed out", 255: "worker failed",
}  # fmt: skip


def mutants(folder: Path) -> dict[str, tuple[Path, int | None]]:
    """Return the file and the exit code of each mutant."""
    found = {}
    for path in sorted(folder.glob("src/**/*.meta")):
        for name, code in json.loads(path.read_text())["exit_code_by_key"].items():
            found[name] = (path.with_suffix(""), code)
    return found


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


def sample(folder: Path, count: int, seed: int, seconds: float) -> list[str]:
    """Shorten the tests of each function and return the names of the drawn mutants."""
    draw = random.Random(seed)
    stats_path = folder / "mutmut-stats.json"
    stats = json.loads(stats_path.read_text())
    tests_of = stats["tests_by_mangled_function_name"]
    for function in sorted(tests_of):
        by_test: dict[str, list[str]] = {}
        for test in sorted(tests_of[function]):
            if stats["duration_by_test"][test] <= seconds:
                by_test.setdefault(test.partition("[")[0], []).append(test)
        tests_of[function] = [draw.choice(each) for each in by_test.values()]
    stats_path.write_text(json.dumps(stats, indent=4))
    names = mutants(folder)
    order = draw.sample(sorted(names), len(names))
    chosen: list[str] = []
    for name in order:
        covered = tests_of.get(re.sub(r"__mutmut_\d+$", "", name))
        if len(chosen) < count and covered and not is_message(*change(names[name][0], name)):
            chosen.append(name)
    (folder / "sample.json").write_text(json.dumps(chosen))
    return chosen


def report(folder: Path) -> str:
    """Return Markdown tables of the sample: counts, and mutants that were not killed."""
    rows, counts = [], Counter()
    chosen = set(json.loads((folder / "sample.json").read_text()))
    for name, (path, code) in mutants(folder).items():
        if name not in chosen:
            continue
        result = RESULTS.get(code, f"exit code {code}")
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
    parser.add_argument("action", choices=("sample", "report"))
    parser.add_argument("--folder", type=Path, default=Path("mutants"))
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    if options.action == "report":
        print(report(options.folder))
    else:
        print(*sample(options.folder, options.count, options.seed, options.seconds), sep="\n")


if __name__ == "__main__":
    main()
