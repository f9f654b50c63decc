"""All measurements of a step on a CPU that have a limit: `step_overhead.py --suite`.

Networks, then the added time over the number of weights, then what theta = 1/2 adds, then the gain
from a second thread. The passes of a step are measured in their plain (NumPy) and compiled forms,
next to a second dense contestant, the control. The record is written after each part; the same
command resumes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from method_cost import FEATHER, HALF, SETTLE, measure_methods
from step_networks import NETWORKS, measure_network
from step_size import LIMITED, SIZES, SPARSITIES, draw_plot, measure_size, measure_threads
from step_turns import TARGET

import torch_feather as feather
from torch_feather.files import replace_file
from torch_feather.training.provenance import provenance

CONTROL = 0.02
"""Largest distance of the control's ratio from 1: beyond it, the machine was not quiet."""
ATTEMPTS = 3
"""Maximum number of measurements of a part, until its control is within `CONTROL` of 1."""
THETA_LIMIT = 1.5
"""Nanoseconds per weight that theta = 1/2 may add to theta = 1."""
QUICK_SIZES = (10**4, 10**5)


def measure_theta(quick: bool, seed: int) -> dict[str, Any]:
    """Return nanoseconds per weight that theta = 1/2 adds to theta = 1, backward pass included."""
    size, repetitions, settle = (QUICK_SIZES[-1], 2, 1) if quick else (LIMITED, 40, SETTLE)
    row = measure_methods(size, TARGET, FEATHER, repetitions, seed, settle)
    one, half = row["added_ns"]["feather"], row["added_ns"][HALF]
    added = {form: {"ns": half[form] - one[form], "limit": THETA_LIMIT} for form in one}
    return {"weights": row["weights"], "repetitions": repetitions, "added": added}


def planned_parts(quick: bool, seed: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield a label and a function for each part, in the order of the record."""
    for name in NETWORKS:
        yield name, lambda name=name: measure_network(name, quick, seed)
    for sparsity in SPARSITIES:
        for size in QUICK_SIZES if quick else SIZES:
            yield (
                f"{size:,} weights, {sparsity:.0%}",
                lambda size=size, sparsity=sparsity: measure_size(size, sparsity, quick, seed),
            )
    yield "theta 0.5", lambda: measure_theta(quick, seed)
    yield "two threads", lambda: measure_threads(2, quick, seed)


def run(file: Path, command: str, threads: int, quick: bool, seed: int) -> None:
    """Measure all parts that `file` does not have yet; write it, a table and a plot.

    Args:
        file: the record; the table and the plot have its name with .txt and .svg.
        command: the command line, for the record.
        threads: CPU threads.
        quick: take two steps per part and leave out large sizes, which shows that all parts run.
        seed: of weights, data and the order of steps.
    """
    torch.set_num_threads(threads)
    record: dict[str, Any] = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **provenance(torch.device("cpu")),
        "engine": feather.engine_info(),
        "settings": {"quick": quick, "seed": seed, "threads": threads},
        "parts": {},
    }
    record["parts"] = completed_parts(file, record)
    print(header(record), flush=True)
    for label, measure in planned_parts(quick, seed):
        if label not in record["parts"]:
            record["parts"][label] = measure_quietly(measure, 1 if quick else ATTEMPTS)
            write(file, json.dumps(record, indent=1))
        print("\n".join(["", f"{label}:", *part_lines(record["parts"][label])]), flush=True)
    text = verdicts(record)
    print(text)
    body = [header(record), table(record), text]
    write(file.with_suffix(".txt"), "\n".join(body))
    draw_plot(
        [part for part in record["parts"].values() if "sparsity" in part],
        file.with_suffix(".svg"),
    )


def measure_quietly(measure: Callable[[], dict[str, Any]], attempts: int) -> dict[str, Any]:
    """Measure a part until its control is within 2% of 1; only the control decides.

    Returns:
        the attempt whose control is closest to 1, with the controls of the others in `discarded`.
    """
    found: list[dict[str, Any]] = []
    while len(found) < attempts and not any(is_quiet(control_of(part)) for part in found):
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        found.append({**measure(), "load_before": load})
    best = min(found, key=lambda part: abs(control_of(part) - 1))
    return {**best, "discarded": [control_of(part) for part in found if part is not best]}


def control_of(part: dict[str, Any]) -> float:
    """Return the ratio of the control to the dense contestant; 1 for a part without a control."""
    control = part.get("contestants", {}).get("control") or part.get("control")
    return control["ratio"] if control else 1.0


def write(file: Path, text: str) -> None:
    """Write a text file whole or not at all, so that an interruption leaves a readable record."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda stream: stream.write(f"{text}\n".encode()))


def completed_parts(file: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a record of the same code, machine and settings; none of another."""
    if not file.exists():
        return {}
    found = json.loads(file.read_text())
    same = ("versions", "commit", "hardware", "engine", "settings")
    # A commit with edits, marked by +, does not determine the code.
    if record["commit"] is None or record["commit"].endswith("+"):
        return {}
    if any(found.get(key) != record[key] for key in same):
        return {}
    print(f"{file}: {len(found['parts'])} completed parts are not repeated", flush=True)
    return found["parts"]


def header(record: dict[str, Any]) -> str:
    """Return hardware, versions, command and units."""
    hardware = record["hardware"]
    lines = [
        f"{hardware['cpu']}, {record['settings']['threads']} thread(s), "
        f"passes: {record['engine']['passes']}",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        f"commit {record['commit'] or 'unknown'}, {record['date']}",
        record["command"],
        "Medians over repetitions of ratios and differences to the dense step of the same "
        "repetition, with 95% CI.",
        "By number of weights: means of these medians over copies at other places in memory.",
        f"A part whose control is not within {CONTROL:.0%} of 1 is measured again, at most "
        f"{ATTEMPTS} times; only the control decides.",
    ]
    if record["settings"]["quick"]:
        lines.append("(--quick: two steps per part; shows that all parts run, is no measurement)")
    return "\n".join(lines)


def table(record: dict[str, Any]) -> str:
    """Return the lines of all parts."""
    parts = record["parts"].items()
    return "\n".join(line for label, part in parts for line in ["", f"{label}:", *part_lines(part)])


def part_lines(part: dict[str, Any]) -> list[str]:
    """Return the lines of one part."""
    load = "" if part["load_before"] is None else f", load before {part['load_before']:.1f}"
    controls = ", ".join(f"{ratio:.3f}" for ratio in part.get("discarded", []))
    again = f"; attempts discarded for their control: {controls}" if controls else ""
    lines = [f"  {part['repetitions']} repetitions{load}{again}"]
    for name, row in part.get("contestants", {}).items():
        low, high = row["interval"]
        judged = verdict(row["ratio"], row["limit"], control=name == "control")
        lines.append(
            f"  {name:<10} {row['median_ms']:>9.1f} ms   {row['ratio']:.3f} of dense"
            f" ({low:.3f} to {high:.3f}){judged}"
        )
    if "control" in part:
        low, high = part["control"]["interval"]
        lines += [
            f"  dense      {part['dense_ns']:>9.2f} ns per weight; one copy {part['copy_ns']:.2f}",
            f"  control    {part['control']['ratio']:>9.3f} of dense ({low:.3f} to {high:.3f})"
            + verdict(part["control"]["ratio"], None, control=True),
        ]
    for form, row in sorted(part.get("added", {}).items(), reverse=True):
        between = row.get("interval")
        shown = f" ({between[0]:.2f} to {between[1]:.2f})" if between else ""
        lines.append(
            f"  {form:<10} {row['ns']:>9.2f} ns per weight added{shown}"
            + verdict(row["ns"], row["limit"])
        )
    for name, row in part.get("gains", {}).items():
        low, high = row["interval"]
        aim = "" if row["aim"] is None else f"   aim {row['aim']:g}"
        lines.append(
            f"  {name:<10} {row['ratio']:>9.2f} times as fast ({low:.2f} to {high:.2f}){aim}"
        )
    return lines


def is_quiet(ratio: float) -> bool:
    """Return whether a control is within 2% of the dense contestant."""
    return 1 - CONTROL <= ratio <= 1 + CONTROL


def verdict(value: float, limit: float | None, control: bool = False) -> str:
    """Return whether a value is within its limit, or a control within 2% of 1, for a table."""
    if control:
        return f"   {'within' if is_quiet(value) else 'OUTSIDE'} 1.00 ± {CONTROL:.2f}"
    if limit is None:
        return ""
    return f"   {'within' if value <= limit else 'OVER'} {limit:g}"


def verdicts(record: dict[str, Any]) -> str:
    """Return values beyond their limits and aims, and controls that show that the run is noise."""
    over, below, outside = [], [], []
    for label, part in record["parts"].items():
        rows = part.get("contestants", {})
        values = [(name, row["ratio"], row["limit"]) for name, row in rows.items()]
        values += [(form, row["ns"], row["limit"]) for form, row in part.get("added", {}).items()]
        over += [
            f"{label}, {name}: {value:.3f} > {limit:g}"
            for name, value, limit in values
            if limit is not None and value > limit
        ]
        below += [
            f"{label}, {name}: {row['ratio']:.2f} < {row['aim']:g}"
            for name, row in part.get("gains", {}).items()
            if row["aim"] is not None and row["ratio"] < row["aim"]
        ]
        if not is_quiet(control_of(part)):
            outside.append(f"{label}: {control_of(part):.3f}")
    lines = ["", "Over their limit: " + ("; ".join(over) or "none")]
    lines.append("Below their aim: " + ("; ".join(below) or "none"))
    lines.append(f"Controls outside of 1.00 ± {CONTROL:.2f}: " + ("; ".join(outside) or "none"))
    return "\n".join(lines)
