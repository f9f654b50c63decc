"""What a step of sparse training costs where the weights are spread over processes.

Processes on this machine (gloo) hold the shards of a synthetic network of equal layers, as
`fully_shard` makes them. Measured, over sizes: seconds of a step's threshold, image and exchange of
latent and sparse weights; bytes and calls of its collectives; memory. From these follows a model
for networks that do not fit here, marked as extrapolated.

    python benchmarks/scale.py --sizes 1e7 1e8 --ranks 1 2
    python benchmarks/scale.py --sizes 1e9 --ranks 1 --dtype bfloat16 --json results/scale.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import torch_feather as feather
from torch_feather.training.provenance import provenance

COLUMNS = 4096
SPARSITY = 0.95
CHECKED = 10**7  # weights up to which the count is checked
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDTH = {"float32": 4, "bfloat16": 2}
# What the model is asked about: weights, and processes that share them.
ASKED = [(1e9, 8), (1e10, 64), (1e11, 512)]
LAYERS = 300


class AlmostThere:
    """A schedule that stays just below its end, where the engine would look at all weights."""

    def table(self, total_steps: int) -> torch.Tensor:
        shares = torch.full((total_steps + 1,), 0.99, dtype=torch.float64)
        shares[-1] = 1.0
        return shares


class Collectives:
    """Counts the sums over processes, and the bytes that each process puts into them."""

    def __init__(self) -> None:
        self.calls, self.bytes, self._inner = 0, 0, dist.all_reduce
        dist.all_reduce = self

    def __call__(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()
        return self._inner(tensor, *args, **kwargs)


def network(size: int, layers: int, dtype: torch.dtype) -> nn.Module:
    """About `size` weights in layers of equal width, of which this process makes its shards."""
    ranks = dist.get_world_size()
    rows = max(1, round(size / layers / COLUMNS / ranks))
    mesh = init_device_mesh("cpu", (ranks,))
    model = nn.Sequential()
    for _ in range(layers):
        layer = nn.Linear(1, 1, bias=False)
        part = torch.empty(rows, COLUMNS, dtype=dtype).normal_(std=0.02)
        layer.weight = nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False))
        model.append(layer)
    return model


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One process's part of a measurement."""
    torch.set_num_threads(1)
    torch.manual_seed(dist.get_rank())
    model = network(int(arguments.size), arguments.layers, DTYPES[arguments.dtype])
    before = peak()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        model, optimizer, sparsity=SPARSITY, total_steps=1000, schedule=AlmostThere()
    )
    every, method = (
        range(len(sparsifier.step.training.binding.weights)),
        sparsifier.step.training.method,
    )
    weights, number = sparsifier.step.training.weights, torch.zeros((), dtype=torch.int64)
    collectives, seconds = Collectives(), {"step": [], "threshold": [], "image": []}
    for _ in range(arguments.repeats):
        dist.barrier()
        start, calls, sent = time.perf_counter(), collectives.calls, collectives.bytes
        sparsifier.before_step(every)
        sparsifier.capture(every)
        sparsifier.after_step(True)
        seconds["step"].append(time.perf_counter() - start)
        exchanged = {"calls": collectives.calls - calls, "bytes": collectives.bytes - sent}
        dist.barrier()
        with torch.no_grad():
            start = time.perf_counter()
            method.refresh(weights, number)
            seconds["threshold"].append(time.perf_counter() - start)
            start = time.perf_counter()
            method.images(weights)
            seconds["image"].append(time.perf_counter() - start)
    local = sum(flat.numel() for flat in weights.flats)
    if local <= CHECKED:
        assert sparsifier.sparsity == round(0.99 * SPARSITY * weights.size) / weights.size
    return {
        "size": weights.size,
        "ranks": dist.get_world_size(),
        "dtype": arguments.dtype,
        "layers": arguments.layers,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ns_per_local_weight": {
            name: 1e9 * statistics.median(values) / local for name, values in seconds.items()
        },
        "exchanged": exchanged,
        "peak_bytes_per_local_weight": (peak() - before) / local,
    }


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def launch(size: float, ranks: int, dtype: str, layers: int, repeats: int) -> dict[str, Any]:
    """Runs the processes of one measurement; returns what the first reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--worker", "--size", size, "--dtype", dtype, "--layers", layers]
    command = [sys.executable, __file__, *map(str, [*options, "--repeats", repeats])]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, env=os.environ | common | {"RANK": str(r)}
        )
        for r in range(ranks)
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"A process of {ranks} failed at {size} weights.")
    return json.loads(said[0])


def model(weights: float, ranks: int, dtype: str, ns: float | None) -> dict[str, Any]:
    """The cost on each process, by the code: see docs/scale.md for what the terms are."""
    width, here, bits = WIDTH[dtype], weights / ranks, (int(weights) - 1).bit_length()
    # Digits of a float32, then of an index, where magnitudes tie; marks of writes; the sum.
    counts = [2**11, 2**10, 2**10, *[2**11] * (bits // 11), 2 ** (bits % 11)]
    return {
        "weights": weights,
        "ranks": ranks,
        "dtype": dtype,
        "gib_kept": width * here / 2**30,
        "gib_for_a_moment": max(4, width) * here / 2**30,
        "bytes_exchanged": 8 * sum(counts) + 4 * LAYERS + 4,
        "collectives": len(counts) + 2,
        "cpu_seconds_extrapolated": None if ns is None else ns * here / 1e9,
    }


def table(record: dict[str, Any]) -> str:
    hardware = record["hardware"]
    lines = [
        f"{hardware['cpu']}, one thread a process",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        f"commit {record['commit'] or 'unknown'}, {record['date']}",
        record["command"],
        "",
        "measured, medians; per weight of one process",
        f"{'weights':>14} {'ranks':>5} {'type':>9} {'step s':>8} {'ns':>7} {'threshold ns':>13}"
        f" {'image ns':>9} {'sums':>5} {'bytes':>8} {'peak B':>7}",
    ]
    for row in record["measured"]:
        ns = row["ns_per_local_weight"]
        lines.append(
            f"{row['size']:>14,} {row['ranks']:>5} {row['dtype']:>9} {row['seconds']['step']:>8.3f}"
            f" {ns['step']:>7.2f} {ns['threshold']:>13.2f} {ns['image']:>9.2f}"
            f" {row['exchanged']['calls']:>5} {row['exchanged']['bytes']:>8,}"
            f" {row['peak_bytes_per_local_weight']:>7.1f}"
        )
    lines += [
        "",
        f"model, per process; {LAYERS} layers; seconds of one CPU thread, extrapolated",
        f"{'weights':>16} {'ranks':>5} {'type':>9} {'GiB kept':>9} {'GiB moment':>11} {'sums':>5}"
        f" {'bytes':>8} {'seconds':>8}",
    ]
    for row in record["model"]:
        seconds = row["cpu_seconds_extrapolated"]
        lines.append(
            f"{int(row['weights']):>16,} {row['ranks']:>5} {row['dtype']:>9}"
            f" {row['gib_kept']:>9.2f}"
            f" {row['gib_for_a_moment']:>11.2f} {row['collectives']:>5}"
            f" {row['bytes_exchanged']:>8,} {'' if seconds is None else f'{seconds:.2f}':>8}"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e7], help="weights")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="add to what is there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.worker:
        arguments.dtype = arguments.dtype[0]
        warnings.simplefilter("ignore", feather.FeatherWarning)
        dist.init_process_group("gloo")
        result = measure(arguments)
        if dist.get_rank() == 0:
            print(json.dumps(result))
        dist.destroy_process_group()
        return
    measured = [
        launch(size, ranks, dtype, arguments.layers, arguments.repeats)
        for dtype in arguments.dtype
        for size in arguments.sizes
        for ranks in arguments.ranks
    ]
    commands = [" ".join(["python", "benchmarks/scale.py", *(argv or sys.argv[1:])])]
    if arguments.json and arguments.json.exists():  # sizes may be measured one at a time
        before = json.loads(arguments.json.read_text())
        measured = before["measured"] + measured
        commands = [before["command"], *commands]
    largest = {
        dtype: max(rows, key=lambda row: row["size"])["ns_per_local_weight"]["step"]
        for dtype in DTYPES
        if (rows := [row for row in measured if row["dtype"] == dtype])
    }
    record = {
        "command": "\n".join(commands),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **provenance(torch.device("cpu")),
        "measured": measured,
        "model": [
            model(weights, ranks, dtype, largest.get(dtype))
            for dtype in DTYPES
            for weights, ranks in ASKED
        ],
    }
    print(table(record))
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
        arguments.json.with_suffix(".txt").write_text(table(record) + "\n")


if __name__ == "__main__":
    main()
