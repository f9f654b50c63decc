"""Measures calls outside of the step on a large network: state_dict, report, masks, finalize.

    python benchmarks/large.py --json results/large.json

Memory is the peak of the process during a call, beyond what it held before, in copies of the
weights. It includes what the call returns. `clone` copies the parameters alone: what a copy costs
on this machine, where most of the time is the first use of new memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch_feather as feather
from torch_feather.training.provenance import provenance

WIDTH = 2000
BOUND_SECONDS, BOUND_COPIES = 0.5, 2.0


def network(size: float) -> nn.Module:
    """Return layers of 4 million weights."""
    layers = max(1, round(size / WIDTH**2))
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))


def trained(size: float) -> tuple[nn.Module, feather.Sparsifier]:
    """Return a model at the end of its training, and its sparsifier."""
    model = network(size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(model, optimizer, sparsity=0.95, total_steps=2)
    for _ in range(2):
        optimizer.step()
    return model, sparsifier


def peak() -> int:
    """Return the peak memory of this process since `reset_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def held() -> int:
    """Return the memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def reset_peak() -> None:
    """Let `peak` start at the present memory; Linux alone has this."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(call: Callable[[], Any], copy: int) -> tuple[float, float]:
    """Return seconds, and peak memory in copies."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator kept would not count
    reset_peak()
    before, start = held(), time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds, (peak() - before) / copy


def measure(size: float, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Return the medians for each call."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        model, sparsifier = trained(size)
        copy = sum(p.numel() * p.element_size() for p in model.parameters())
        calls = {"clone": lambda model=model: [p.detach().clone() for p in model.parameters()]}
        calls |= {n: getattr(sparsifier, n) for n in ("state_dict", "masks", "report", "finalize")}
        for name, call in calls.items():
            found.setdefault(name, []).append(measured(call, copy))
        del model, sparsifier, calls
    return [
        {
            "call": name,
            "threads": threads,
            "weights": copy // 4,
            "seconds": statistics.median(seconds for seconds, _ in found[name]),
            "copies": statistics.median(copies for _, copies in found[name]),
        }
        for name in found
    ]


def table(record: dict[str, Any]) -> str:
    lines = [
        record["hardware"]["cpu"],
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        f"commit {record['commit'] or 'unknown'}, {record['date']}",
        record["command"],
        "",
        f"medians; bounds: {BOUND_SECONDS} seconds, {BOUND_COPIES:g} copies of the weights",
        f"{'call':<12} {'weights':>12} {'threads':>7} {'seconds':>8} {'copies':>7}",
    ]
    for row in record["measured"]:
        lines.append(
            f"{row['call']:<12} {row['weights']:>12,} {row['threads']:>7} {row['seconds']:>8.3f}"
            f" {row['copies']:>7.2f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=1e8, help="weights")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to FILE")
    arguments = parser.parse_args(argv)
    record = {
        "command": " ".join(["python", "benchmarks/large.py", *(argv or sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **provenance(torch.device("cpu")),
        "measured": [
            row
            for threads in arguments.threads
            for row in measure(arguments.size, threads, arguments.repeats)
        ],
    }
    print(table(record))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
        arguments.json.with_suffix(".txt").write_text(table(record) + "\n")


if __name__ == "__main__":
    main()
