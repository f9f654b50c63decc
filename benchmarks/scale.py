"""Cost of a sparse training step if the weights are sharded over processes.

Processes on this machine (gloo) hold the shards of a synthetic network of equal layers, as
`fully_shard` creates them. For each size, measures the seconds of a step, its threshold and its
effective weights; bytes and calls of collectives; and memory. The time of a step is its CPU time in
one process, without waiting for the others: a machine may have fewer cores than processes. A cost
model extrapolates to networks that do not fit on this machine; its output is marked.

    python benchmarks/scale.py --sizes 1e7 1e8 --ranks 1 2
    python benchmarks/scale.py --sizes 1e9 --ranks 1 --dtype bfloat16 --json results/scale.json \\
        --plot results/scale.svg
    python benchmarks/scale.py --memory --sizes 1e7 1e8 --ranks 1 2 --json results/scale_memory.json
    python benchmarks/scale.py --sizes --json results/scale.json  # only the cost model, again
"""

from __future__ import annotations

import argparse
import contextlib
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

import engine_parts
import torch
import torch.distributed as dist
from scale_model import MODELLED, memory_table, model, model_table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import torch_feather as feather
from torch_feather.training.provenance import provenance

COLUMNS = 4096
SPARSITY = 0.95
CHECKED = 10**7  # weights up to which the number of zeros is checked
# What a record of memory alone has of each measurement.
OF_MEMORY = {
    "size", "ranks", "dtype", "layers", "baseline_bytes", "steps_bytes_per_local_weight",
    "peak_bytes_per_local_weight",
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class AlmostThere:
    """A schedule that stays below its end, where the engine would check all weights."""

    def table(self, total_steps: int) -> torch.Tensor:
        fractions = torch.full((total_steps + 1,), 0.99, dtype=torch.float64)
        fractions[-1] = 1.0
        return fractions


class Collectives:
    """Counts all-reduce calls and the bytes that each process contributes."""

    def __init__(self) -> None:
        self.calls, self.bytes, self._inner = 0, 0, dist.all_reduce
        dist.all_reduce = self

    def __call__(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()
        return self._inner(tensor, *args, **kwargs)


def network(size: int, layers: int, dtype: torch.dtype) -> nn.Module:
    """Create this process's shards of a network with about `size` weights in equal layers."""
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
    """Run one process's part of a measurement."""
    torch.set_num_threads(1)
    torch.manual_seed(dist.get_rank())
    baseline = warm_up(arguments)
    model = network(int(arguments.size), arguments.layers, DTYPES[arguments.dtype])
    before = peak()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = feather.sparsify(
        model, optimizer, sparsity=SPARSITY, total_steps=1000, schedule=AlmostThere()
    )
    first = peak() - before  # with the first selection, when the sparsity jumps
    forget_peak()
    collectives, cpu = Collectives(), []
    seconds: dict[str, list[float]] = {"step": [], "threshold": [], "effective_weights": []}
    for _ in range(arguments.repeats):
        dist.barrier()
        start, begun = time.perf_counter(), time.thread_time()
        calls, sent = collectives.calls, collectives.bytes
        engine_parts.step(sparsifier)
        cpu.append(time.thread_time() - begun)
        seconds["step"].append(time.perf_counter() - start)
        exchanged = {"calls": collectives.calls - calls, "bytes": collectives.bytes - sent}
    held = peak() - before  # the parts have memory of their own
    parts = engine_parts.step_parts(sparsifier, torch.zeros((), dtype=torch.int64))
    for _ in range(arguments.repeats):
        dist.barrier()
        with torch.no_grad():
            for name in ("threshold", "effective_weights"):
                start = time.perf_counter()
                parts[name]()
                seconds[name].append(time.perf_counter() - start)
    local = sum(flat.numel() for flat in engine_parts.latent_weights(sparsifier))
    size = sum(p.numel() for p in engine_parts.parameters(sparsifier))
    if local <= CHECKED:
        assert sparsifier.sparsity == round(0.99 * SPARSITY * size) / size
    return {
        "size": size,
        "ranks": dist.get_world_size(),
        "dtype": arguments.dtype,
        "layers": arguments.layers,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ns_per_local_weight": {
            name: 1e9 * statistics.median(values) / local for name, values in seconds.items()
        },
        "cpu_ns_per_local_weight": 1e9 * statistics.median(cpu) / local,
        "exchanged": exchanged,
        "baseline_bytes": baseline,
        "steps_bytes_per_local_weight": (baseline + held) / local,
        "peak_bytes_per_local_weight": (baseline + max(first, held)) / local,
    }


def warm_up(arguments: argparse.Namespace) -> int:
    """Train a tiny network; return the bytes that it takes: what any number of weights needs."""
    model = network(1, arguments.layers, DTYPES[arguments.dtype])
    start = peak()
    sparsifier = feather.sparsify(
        model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=SPARSITY, total_steps=1000
    )
    for _ in range(2):
        engine_parts.step(sparsifier)
    return peak() - start


def peak() -> int:
    """Return the peak memory of this process in bytes."""
    try:  # of this process alone: `getrusage` may begin with the peak of the process that forked
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Let the peak begin at the present memory, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def launch(size: float, ranks: int, dtype: str, layers: int, repeats: int) -> dict[str, Any]:
    """Run the processes of one measurement; return the report of the first one."""
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
    reports = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"One of {ranks} processes failed at {size} weights.")
    return json.loads(reports[0])


def head(record: dict[str, Any]) -> list[str]:
    return [
        f"{record['hardware']['cpu']}, one thread per process",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        f"commit {record['commit'] or 'unknown'}, {record['date']}",
        record["command"],
    ]


def table(record: dict[str, Any]) -> str:
    lines = [
        *head(record),
        "",
        "medians; CPU ns of a step, ns of threshold and effective weights, per local weight",
        f"{'weights':>14} {'ranks':>5} {'type':>9} {'step s':>8} {'CPU ns':>7} {'threshold':>13}"
        f" {'effective':>9} {'calls':>5} {'bytes':>8} {'peak B':>7}",
    ]
    for row in record["measured"]:
        ns = row["ns_per_local_weight"]
        lines.append(
            f"{row['size']:>14,} {row['ranks']:>5} {row['dtype']:>9} {row['seconds']['step']:>8.3f}"
            f" {row['cpu_ns_per_local_weight']:>7.2f} {ns['threshold']:>13.2f}"
            f" {ns['effective_weights']:>9.2f}"
            f" {row['exchanged']['calls']:>5} {row['exchanged']['bytes']:>8,}"
            f" {row['peak_bytes_per_local_weight']:>7.1f}"
        )
    lines += ["", *memory_table(record["measured"]), "", *model_table(record["model"])]
    return "\n".join(lines)


def table_of_memory(record: dict[str, Any]) -> str:
    return "\n".join([*head(record), "", *memory_table(record["measured"])])


def draw(record: dict[str, Any], file: Path) -> None:
    """Draw the CPU time per local weight and the exchanged bytes over the number of weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time_axes, byte_axes) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for dtype, style in zip(DTYPES, ("-", "--"), strict=True):
        for number, ranks in enumerate(sorted({row["ranks"] for row in record["measured"]})):
            rows = sorted(
                (r for r in record["measured"] if (r["dtype"], r["ranks"]) == (dtype, ranks)),
                key=lambda row: row["size"],
            )
            sizes, label = [row["size"] for row in rows], f"{ranks} × {dtype}"
            look = {"linestyle": style, "marker": "o", "color": f"C{number}", "label": label}
            time_axes.plot(sizes, [row["cpu_ns_per_local_weight"] for row in rows], **look)
            byte_axes.plot(sizes, [row["exchanged"]["bytes"] / 1000 for row in rows], **look)
    time_axes.set(xscale="log", ylim=(0, None), ylabel="CPU time of a step, ns per local weight")
    byte_axes.set(xscale="log", ylim=(0, None), ylabel="sent per step and process, kB")
    for axes in (time_axes, byte_axes):
        axes.set_xlabel("weights")
    time_axes.legend(frameon=False, fontsize="small")
    figure.savefig(file)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=float, nargs="*", default=[1e6, 1e7], help="weights")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="show and record memory, no times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the measurements to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the record into FILE")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def record_of(
    measured: list[dict[str, Any]], command: str, before: dict[str, Any] | None, memory: bool
) -> dict[str, Any]:
    """Return measurements after those of an earlier record, with the cost model of all.

    Args:
        measured: new measurements.
        command: their command.
        before: the earlier record; None for none.
        memory: whether only memory is recorded.
    """
    if memory:
        measured = [{k: v for k, v in row.items() if k in OF_MEMORY} for row in measured]
    record = before
    if measured or before is None:
        record = {
            "command": command if before is None else f"{before['command']}\n{command}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **provenance(torch.device("cpu")),
            "measured": [*(before["measured"] if before else []), *measured],
        }
    if memory:
        return record
    largest = {
        dtype: max(rows, key=lambda row: row["size"])["cpu_ns_per_local_weight"]
        for dtype in DTYPES
        if (rows := [row for row in record["measured"] if row["dtype"] == dtype])
    }
    modelled = [
        model(weights, ranks, dtype, largest.get(dtype))
        for dtype in DTYPES
        for weights, ranks in MODELLED
    ]
    return record | {"model": modelled}


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
    command = " ".join(["python", "benchmarks/scale.py", *(argv or sys.argv[1:])])
    before = None
    if arguments.json and arguments.json.exists():  # sizes can be measured one at a time
        before = json.loads(arguments.json.read_text())
    record = record_of(measured, command, before, arguments.memory)
    text = table_of_memory(record) if arguments.memory else table(record)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
        arguments.json.with_suffix(".txt").write_text(text + "\n")
    if arguments.plot:
        draw(record, arguments.plot)


if __name__ == "__main__":
    main()
