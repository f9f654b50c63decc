"""Fuzz everything that reads files or states, and print a table.

A child process runs many inputs, one after the other, within bounds of memory and time. It is
started again if an input ends it. Run the command again with the same folder to continue.

    python -m tests.fuzz --minutes 60
    python -m tests.fuzz --minutes 5 --targets images archives
    python -m tests.fuzz --replay tests/fuzz/findings/images/*
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .targets import OWN, TARGETS, make_target

ROOT = Path(__file__).parents[2]


def main(argv: list[str] | None = None) -> int:
    """Run the command; return 1 if there are findings."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=60, help="how long to run")
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=list(TARGETS | OWN),
        default=list(TARGETS),
        help=", ".join(TARGETS),
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".fuzz", help="corpus and findings")
    parser.add_argument(
        "--out", type=Path, help="write the table and the numbers as PATH.txt, .json"
    )
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="run findings again")
    options = parser.parse_args(argv)
    if options.replay:
        return replay(options.replay)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child, too
    total = run(options.targets, options.folder, 60 * options.minutes)
    text = table(total)
    print(text)
    if options.out:
        options.out.with_suffix(".txt").write_text(text + "\n")
        options.out.with_suffix(".json").write_text(json.dumps(total, indent=1) + "\n")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return int(any(target["findings"] for target in total["targets"].values()))


def run(names: list[str], folder: Path, seconds: float) -> dict[str, Any]:
    """Fuzz targets for some time; return the totals, earlier runs in the same folder included."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "totals.json"
    total = json.loads(file.read_text()) if file.exists() else empty_total()
    start = time.monotonic()
    while (left := seconds - (time.monotonic() - start)) > 0:
        before, began = json.loads(json.dumps(total)), time.monotonic()
        total["processes"] += 1
        child = start_child(names, folder, total["processes"], left)
        try:
            for line in child.stdout or ():
                add(total, before, json.loads(line), time.monotonic() - began)
                count_findings(total, folder)
                store(total, file)
        except BaseException:
            child.terminate()
            raise
        code = child.wait()
        if code != 0 and not record_death(folder, code):
            total["unconfirmed"] += 1
    count_findings(total, folder)
    store(total, file)
    return total


def store(total: dict[str, Any], file: Path) -> None:
    """Write totals so that a run that is killed can be continued."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(total))
    new.replace(file)


def start_child(
    names: list[str], folder: Path, number: int, seconds: float
) -> subprocess.Popen[str]:
    """Start the process that runs inputs."""
    arguments = [",".join(names), str(folder), str(number), str(seconds)]
    command = [sys.executable, "-m", "tests.fuzz.engine", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": ""}
    with open(folder / "child.log", "a") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )


def empty_total() -> dict[str, Any]:
    """Return totals of no input."""
    return {
        "targets": {},
        "seconds": 0.0,
        "processes": 0,
        "unconfirmed": 0,
        "slowest": 0.0,
        "largest": 0.0,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
    }


def add(
    total: dict[str, Any], before: dict[str, Any], line: dict[str, Any], seconds: float
) -> None:
    """Set totals to those before a child plus its own."""
    total["seconds"] = before["seconds"] + seconds
    for key in ("slowest", "largest"):
        total[key] = max(before[key], line[key])
    for name, own in line["targets"].items():
        old = before["targets"].get(name, {})
        sums = {key: old.get(key, 0) + own[key] for key in ("inputs", "accepted", "seconds")}
        total["targets"][name] = {**sums, "lines": max(old.get("lines", 0), own["lines"])}


def count_findings(total: dict[str, Any], folder: Path) -> None:
    """Set the number of different findings of each target."""
    for name, target in total["targets"].items():
        found = list((folder / "findings" / name).glob("*.txt"))
        target["findings"] = len(found)


def record_death(folder: Path, code: int) -> bool:
    """Keep the input that ended the child as a finding, if it ends another one, too.

    Returns:
        Whether it does. If not, the input is only counted.

    Raises:
        RuntimeError: the child failed outside of an input.
    """
    running = folder / "running"
    if code > 0 or not running.exists():
        raise RuntimeError(f"the child failed with status {code}; see {folder / 'child.log'}")
    name = running.read_text()
    current = folder / f"current-{name}"
    command = [sys.executable, "-m", "tests.fuzz.engine", "--once", name, str(current)]
    again = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    if again.returncode >= 0:  # the machine was busy or out of memory, or inputs added up
        return False
    file = folder / "findings" / name / f"ended{-code}"
    file.write_bytes(current.read_bytes())
    reason = signal.Signals(-code).name
    hung = " (it did not return to Python in time)" if reason == "SIGALRM" else ""
    file.with_suffix(".txt").write_text(f"The process was ended by {reason}{hung}.\n")
    return True


def table(total: dict[str, Any]) -> str:
    """Return the totals as text."""
    rows = [("target", "inputs", "accepted", "line pairs", "ms each", "findings")]
    targets = total["targets"]
    for name, one in targets.items():
        each = 1000 * one["seconds"] / max(1, one["inputs"])
        rows.append(
            (
                name,
                f"{one['inputs']:,}",
                f"{one['accepted']:,}",
                f"{one['lines']:,}",
                f"{each:.1f}",
                f"{one['findings']}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    inputs, busy = (sum(one[key] for one in targets.values()) for key in ("inputs", "seconds"))
    hours, processor = total["seconds"] / 3600, busy / 3600
    lines += [
        "",
        f"{inputs:,} inputs in {60 * hours:.0f} minutes, {inputs / max(hours, 1e-9):,.0f} an hour; "
        f"{60 * processor:.0f} minutes of one core, {inputs / max(processor, 1e-9):,.0f} an hour",
        f"slowest input {total['slowest']:.2f} s, largest {total['largest']:.0f} MiB, "
        f"{total['processes']} processes, of which {total['unconfirmed']} ended without a reason "
        f"that an input shows again; Python {total['python']}, {total['machine']}",
    ]
    return "\n".join(lines)


def replay(files: list[Path]) -> int:
    """Run findings again in this process, without bounds; their folders name the targets."""
    import tempfile

    status = 0
    for file in files:
        if file.suffix == ".txt":
            continue
        with tempfile.TemporaryDirectory() as scratch:
            target = make_target(file.parent.name, Path(scratch))
            try:
                print(f"{file}: {'accepted' if target.check(file.read_bytes()) else 'refused'}")
            except Exception as error:
                print(f"{file}: {type(error).__name__}: {error}")
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
