"""Time to find the magnitude below which 95% of the weights lie.

Compares torch-feather with torch.sort, torch.kthvalue, torch.topk (CUDA) and one read of the
weights (a sum). Every candidate except the last first writes the magnitudes of the weights into the
same scratch memory, as the engine does. The order of candidates is random in each repetition.

    python benchmarks/selection.py --sizes 1e6 25e6 250e6
    python benchmarks/selection.py --device cuda --json results/selection.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from torch_feather.selection import select
from torch_feather.selection.device import TorchPasses, select_device
from torch_feather.training.provenance import provenance

SPARSITY = 0.95
LONGEST_CALL = 60.0  # seconds; slower candidates are left out
LONGEST_CANDIDATE = 60.0  # seconds for all repetitions; slow candidates are repeated less, >= 3
BASE_BYTES = 8  # per weight: the weights and the scratch memory


@dataclass
class Candidate:
    """A way to find the k-th smallest magnitude."""

    name: str
    find: Callable[[], Tensor]
    """Returns the k-th smallest magnitude; for the read, the sum of the weights."""
    extra_bytes: int
    """Upper bound of memory per weight in addition to weights and scratch."""
    finds_kth: bool = True


@dataclass
class Measurement:
    """Seconds of each call; without calls, the reason why it was skipped."""

    size: int
    name: str
    seconds: list[float] = field(default_factory=list)
    skipped: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def candidates(weights: Tensor, k: int) -> list[Candidate]:
    size = weights.numel()
    scratch = torch.empty_like(weights)
    count = torch.full((), k, dtype=torch.int64, device=weights.device)

    def magnitudes() -> Tensor:
        return torch.abs(weights, out=scratch)

    found = [
        Candidate("torch-feather", lambda: select(magnitudes, count).value, 2),
        Candidate("torch.kthvalue", lambda: magnitudes().kthvalue(k).values, 16),
        Candidate("torch.sort", lambda: magnitudes().sort().values[k - 1], 24),
    ]
    if weights.is_cuda:
        by_torch = lambda: select_device(magnitudes(), count, passes=TorchPasses)  # noqa: E731
        top = lambda: magnitudes().topk(size - k + 1, sorted=False).values.min()  # noqa: E731
        found.insert(1, Candidate("feather without Triton", lambda: by_torch().value, 24))
        found.append(Candidate("torch.topk of the kept", top, 24))
    return [*found, Candidate("one read (sum)", weights.sum, 0, finds_kth=False)]


def timed(find: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Return the seconds of a call until its result is available, and the result."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = find()
        return time.perf_counter() - start, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    result = find()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3, result


def free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, AttributeError, ValueError):
        return float("inf")  # unknown on this system


def measure(
    size: int, device: torch.device, repeats: int, rates: dict[str, float]
) -> list[Measurement]:
    """Measure all candidates at one size.

    Args:
        size: number of weights.
        device: device of the weights.
        repeats: repetitions of each candidate.
        rates: seconds per weight of each candidate at smaller sizes; updated.
    """
    free = free_bytes(device)
    if BASE_BYTES * size > 0.9 * free:
        reason = f"requires {BASE_BYTES * size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return [Measurement(size, "all", skipped=reason)]
    weights = torch.randn(size, device=device) * 0.02
    k = round(SPARSITY * size)
    free -= BASE_BYTES * size

    results, running, kth = {}, {}, None
    for candidate in candidates(weights, k):
        result = results[candidate.name] = Measurement(size, candidate.name)
        expected = rates.get(candidate.name, 0.0) * size
        if candidate.extra_bytes * size > 0.9 * free:
            needed = candidate.extra_bytes * size / 1e9
            result.skipped = f"requires up to {needed:.1f} GB more, {free / 1e9:.1f} GB are free"
        elif expected > LONGEST_CALL:
            result.skipped = f"about {expected:.0f} s per call, estimated from the smaller size"
        if result.skipped:
            continue
        timed(candidate.find, device)  # compiles, allocates
        first, found = timed(candidate.find, device)
        rates[candidate.name] = first / size
        if candidate.finds_kth:
            kth = found.item() if kth is None else kth
            if found.item() != kth:
                raise SystemExit(f"{candidate.name} found {found.item()}, torch-feather {kth}")
        if first > LONGEST_CALL:
            result.skipped = f"took {first:.0f} s per call"
            continue
        fewer = max(3, int(LONGEST_CANDIDATE / max(first, 1e-9)))
        running[candidate.name] = (candidate, min(repeats, fewer))

    for repeat in range(repeats):
        for name in random.sample(list(running), len(running)):
            candidate, count = running[name]
            if repeat < count:
                results[name].seconds.append(timed(candidate.find, device)[0])
    return list(results.values())


def table(results: list[Measurement]) -> str:
    lines = [
        f"{'weights':>11}  {'':<22} {'median ms':>10} {'min':>10} {'max':>10} {'n':>4}"
        f" {'/feather':>8} {'/ read':>8}"
    ]
    medians = {(r.size, r.name): r.median for r in results if r.seconds}
    for r in results:
        lead = f"{r.size:>11,}  {r.name:<22}"
        if not r.seconds:
            lines.append(f"{lead} skipped: {r.skipped}")
            continue
        columns = [f"{1e3 * x:>10.3f}" for x in (r.median, min(r.seconds), max(r.seconds))]
        ratios = [
            f"{r.median / medians[r.size, name]:>8.2f}" if (r.size, name) in medians else f"{'':>8}"
            for name in ("torch-feather", "one read (sum)")
        ]
        lines.append(" ".join([lead, *columns, f"{len(r.seconds):>4}", *ratios]))
    return "\n".join(lines)


def header(facts: dict) -> str:
    hardware, versions = facts["hardware"], facts["versions"]
    where = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} thread(s)"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{where}\n{packages}\ncommit {facts['commit'] or 'unknown'}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = lambda text: int(float(text))  # noqa: E731
    parser.add_argument("--sizes", type=whole, nargs="+", default=[10**6, 25 * 10**6, 250 * 10**6])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=21, help="repetitions of each candidate")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all timings to FILE")
    arguments = parser.parse_args()
    if min(arguments.sizes) < 20:
        parser.error("--sizes: at least 20 weights, so that 5% are one weight")
    if arguments.repeats < 1:
        parser.error("--repeats: at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device available")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    random.seed(0)
    torch.manual_seed(0)
    device = torch.device(arguments.device)

    facts = provenance(device)
    print(header(facts))
    print(
        f"k-th magnitude at {SPARSITY:.0%}, float32, random order, "
        f"{arguments.repeats} repetitions\n"
    )
    results: list[Measurement] = []
    rates: dict[str, float] = {}
    for size in sorted(arguments.sizes):
        results += measure(size, device, arguments.repeats, rates)
    print(table(results))
    if arguments.json:
        record = {"command": " ".join(sys.argv), **facts, "sparsity": SPARSITY}
        record["results"] = [asdict(r) for r in results]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
