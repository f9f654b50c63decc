"""Overhead of sparse training per training step, relative to dense training.

All contestants are copies of one network with the same initial weights. In each repetition, every
contestant takes one complete step (forward, backward, clipping, optimizer) on the same new random
batch, in random order. `control` is a second dense copy, whose ratio shows the noise of the
machine. `official` is the official implementation, which wraps modules.

    python benchmarks/step_overhead.py --suite
    python benchmarks/step_overhead.py --suite --reference ../feather
    python benchmarks/step_overhead.py --suite --device cuda
    python benchmarks/step_overhead.py --network resnet20 --batch 16 --theta 1 .5
    python benchmarks/step_overhead.py --method all --json results/method_overhead.json

`--suite` measures all that has a limit. On a CPU, these are six networks and the added time from
0.1 to 100 million weights, with one thread, in about twelve minutes (`step_suite.py`). With
`--reference` or on a GPU, they are the networks that the official implementation trains too.

Methods with an option `schedule` are at the final sparsity in all repetitions (but see `--at`).
Other methods run through their entire schedule in the measured repetitions. The engine's part of a
step is measured separately, in the third quarter of a schedule, before the last phase of any
method.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import engine_cost
import official
import step_suite
import torch
import torch.nn.functional as F
from renamed_options import current_options
from step_networks import NETWORKS
from step_tables import comparison_table, header, limits_table
from step_turns import compare
from timed_call import timed
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.methods import method_options
from torch_feather.prunable import find_prunable
from torch_feather.training.provenance import provenance

CLASSES = 100
UNRECORDED = ("json", "reference", "whole", "quick")
WARMUP = 3  # repetitions before the measured ones: memory is allocated, kernels are chosen
ENOUGH = 40  # repetitions; fewer are a trial, not a measurement
ENGINE_BATCH = 8  # images at most; the engine's cost does not depend on them
SIMD = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve")

# Networks of the suite with the official implementation and of that on a GPU, with batch sizes.
SUITE = [("resnet20", 128), ("mobilenet_v1", 128), ("resnet20", 16)]
# Limits of the ratio at 95% for feather with theta = 1, by network and batch. Those on a CPU are in
# step_networks.py.
GPU_LIMITS = {("resnet20", 128): 1.10, ("timm/resnet50", 256): 1.01}
GRAPH_LIMITS = {("resnet20", 128): 1.04}
# Limits on a CPU for other methods with default options: by network and batch, and for single ones.
METHOD_LIMITS = {("resnet20", 128): 1.10}
OWN_LIMITS = {"spartan": 1.30}


class Contestant:
    """A copy of the network with its optimizer and sparse training method."""

    def __init__(self, model: nn.Module, amp: bool = False) -> None:
        self.model, self.amp = copy.deepcopy(model), amp
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4
        )
        self.before_forward: Callable[[], object] = lambda: None
        self.sparsifier: feather.Sparsifier | None = None
        self.limit: float | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: tuple[Tensor, Tensor] | None = None  # what the graph reads

    def step(self, x: Tensor, y: Tensor) -> None:
        if self.graph is None or self.batch is None:
            self.train(x, y)
            return
        for memory, value in zip(self.batch, (x, y), strict=True):
            memory.copy_(value)
        self.graph.replay()

    def capture(self, x: Tensor, y: Tensor) -> None:
        """Record the step as a CUDA graph; all later steps replay it."""
        self.batch = x.clone(), y.clone()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):  # libraries allocate their memory on the stream of the graph
                self.train(*self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            self.train(*self.batch)
        self.graph = graph

    def train(self, x: Tensor, y: Tensor) -> None:
        self.before_forward()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 3.0)
        self.optimizer.step()


def build(
    arguments: argparse.Namespace,
    network: str,
    batch: int,
    reference: ModuleType | None,
    total: int | None = None,
) -> tuple[nn.Module, dict[str, Contestant]]:
    """Create the network and all contestants.

    Args:
        arguments: the command line.
        network: name of the network.
        batch: batch size.
        reference: module of the official implementation, if it takes part.
        total: steps of the schedules; None for the number of repetitions.

    Returns:
        The network, and contestants by name, `dense` first.
    """
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    model = feather.models.create(network, CLASSES).to(device).to(memory_format=layout)
    found = {"dense": Contestant(model, arguments.amp), "control": Contestant(model, arguments.amp)}
    total = total or WARMUP + arguments.steps + (WARMUP if arguments.graph else 0)
    example = torch.randn(1, 3, arguments.size, arguments.size, device=device)

    for method, theta in itertools.product(arguments.method, arguments.theta):
        known = method_options(method)
        options: dict[str, Any] = {}
        if "schedule" in known and arguments.at == "end":
            options["schedule"] = "constant"
        if "example_input" in known:
            options["example_input"] = example
        if "theta" in known and theta != "auto":
            options["theta"] = theta
        one = Contestant(model, arguments.amp)
        one.sparsifier = feather.sparsify(
            one.model,
            one.optimizer,
            method,
            sparsity=arguments.sparsity,
            total_steps=total,
            **options,
        )
        effective = one.sparsifier.method.gradient.theta if "theta" in known else None
        if arguments.sparsity == 0.95:
            one.limit = limit(arguments, method, network, batch, effective)
        # A method without theta is measured once, for any number of thetas.
        found[method if effective is None else f"{method}, θ {effective:g}"] = one

    if reference is not None:
        found["official"] = official_contestant(arguments, model, reference, total)
    return model, found


def official_contestant(
    arguments: argparse.Namespace, model: nn.Module, reference: ModuleType, total: int
) -> Contestant:
    """Return the official implementation around a copy of the network."""
    one = Contestant(model, arguments.amp)
    # At the end: the second half of a schedule, which has the final sparsity.
    at_end = arguments.at == "end"
    pruner = official.wrap(
        reference,
        one.model,
        torch.device(arguments.device),
        sparsity=arguments.sparsity,
        steps_per_epoch=2 * total if at_end else total,
        epochs=1,
    )
    pruner.step_idx = total if at_end else 0
    one.before_forward = pruner.update_thresh
    return one


def limit(
    arguments: argparse.Namespace, method: str, network: str, batch: int, theta: float | None
) -> float | None:
    """Return the limit of the ratio to the dense step at 95%; None without a limit."""
    case = network, batch
    if arguments.device == "cuda":
        limits = GRAPH_LIMITS if arguments.graph else GPU_LIMITS
        return limits.get(case) if (method, theta) == ("feather", 1.0) else None
    if method == "feather":
        known = NETWORKS.get(f"{network}, batch {batch}")
        form = feather.engine_info()["passes"]
        return known.limits.get(form) if known and theta == 1.0 else None
    common = METHOD_LIMITS.get(case)
    return None if common is None else OWN_LIMITS.get(method, common)


def time_steps(
    contestants: dict[str, Contestant],
    repetitions: int,
    shape: Sequence[int],
    device: torch.device,
    channels_last: bool,
    seed: int,
    graph: bool = False,
) -> dict[str, list[float]]:
    """Return the milliseconds of each contestant's step in each repetition.

    With `graph`, the steps after the first are replayed as CUDA graphs.
    """
    draw = random.Random(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(WARMUP + repetitions):
        x = torch.randn(*shape, device=device).contiguous(memory_format=layout)
        y = torch.randint(CLASSES, (shape[0],), device=device)
        for name in draw.sample(list(contestants), len(contestants)):
            elapsed = timed(partial(contestants[name].step, x, y), device)
            if i >= WARMUP:
                samples[name].append(elapsed)
            elif graph and i == 0:
                contestants[name].capture(x, y)
    return samples


def engine_costs(
    arguments: argparse.Namespace, network: str, batch: int
) -> dict[str, dict[str, Any]]:
    """Return the engine's cost for each method, in the third quarter of a separate schedule."""
    device, size = torch.device(arguments.device), arguments.size
    half = 2 * (engine_cost.WARMUP + engine_cost.REPEATS + 1)  # twice the steps of a measurement
    _, contestants = build(arguments, network, batch, None, total=2 * half)
    sparse = {name: one for name, one in contestants.items() if one.sparsifier is not None}
    shape = (min(batch, ENGINE_BATCH), 3, size, size)
    time_steps(sparse, half - WARMUP, shape, device, arguments.channels_last, arguments.seed)
    return {
        name: engine_cost.measure(one.sparsifier, device)
        for name, one in sparse.items()
        if one.sparsifier
    }


def run(
    arguments: argparse.Namespace, network: str, batch: int, reference: ModuleType | None
) -> dict[str, Any]:
    """Measure one network at one batch size; return its part of the record."""
    device = torch.device(arguments.device)
    model, contestants = build(arguments, network, batch, reference)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    shape = (batch, 3, arguments.size, arguments.size)
    with warnings.catch_warnings():
        # A layer of an untrained network can be empty at the final sparsity.
        warnings.simplefilter("ignore", feather.FeatherWarning)
        samples = time_steps(
            contestants, arguments.steps, shape, device, arguments.channels_last, arguments.seed,
            arguments.graph,
        )  # fmt: skip
        engine_rows = engine_costs(arguments, network, batch)
    compared = compare(samples, arguments.seed)
    for name, one in contestants.items():
        compared[name]["limit"] = one.limit
    return {
        "network": network,
        "batch": batch,
        "prunable": sum(p.parameter.numel() for p in find_prunable(model)),
        "load_before": load,
        "contestants": compared,
        "engine": engine_rows,
        "samples_ms": samples,
    }


def vector_units() -> dict[str, Any]:
    """Return the vector instructions of the CPU (on Linux), and the set that PyTorch uses."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    return {
        "simd": [name for name in SIMD if name in flags],
        "simd_used": torch.backends.cpu.get_cpu_capability(),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    theta = lambda text: text if text == "auto" else float(text)  # noqa: E731
    parser.add_argument(
        "--suite", action="store_true", help="measure the networks that have a limit"
    )
    parser.add_argument("--network", default="resnet20", help="name, or timm/NAME")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="height and width of images")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--method", nargs="+", default=["feather"], help="method names, or all")
    parser.add_argument("--theta", type=theta, nargs="+", help="default: auto; with --suite 1 .5")
    parser.add_argument("--steps", type=int, default=ENOUGH, help="measured repetitions")
    parser.add_argument(
        "--at",
        choices=["end", "ramp"],
        default="end",
        help="measure at the final sparsity, or over an entire cubic schedule",
    )
    parser.add_argument("--reference", type=Path, help=official.REFERENCE_HELP)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--graph", action="store_true", help="replay each step as a CUDA graph")
    parser.add_argument("--threads", type=int, help="CPU threads; default: 2, suite on a CPU: 1")
    parser.add_argument(
        "--channels-last", action="store_true", help="use the channels_last memory format"
    )
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="suite on a CPU: show in a minute that it runs"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to FILE")
    arguments = parser.parse_args(current_options(argv, official.RENAMED))
    check(parser, arguments)
    return arguments


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Check the options, and give those that depend on others their values."""
    arguments.whole = arguments.suite and arguments.device == "cpu" and not arguments.reference
    if arguments.threads is None:
        arguments.threads = 1 if arguments.whole else 2
    for name in ("batch", "size", "steps", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device available")
    if arguments.graph and (arguments.device != "cuda" or arguments.reference):
        parser.error("--graph: requires --device cuda, without --reference, which reads the device")
    if arguments.quick and not arguments.whole:
        parser.error("--quick: belongs to --suite on a CPU without --reference")
    if "all" in arguments.method:
        arguments.method = feather.available_methods()
    for name in arguments.method:
        if name not in feather.available_methods():
            parser.error(f"--method {name}: choose from {', '.join(feather.available_methods())}")
    if arguments.theta is None:
        arguments.theta = [1.0, 0.5] if arguments.suite else ["auto"]
    if arguments.suite and arguments.json is None:
        name = "step_suite" if arguments.whole else "step_overhead"
        arguments.json = Path(f"results/{name}.json")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.whole:
        command = official.recorded_command(argv, {})
        step_suite.run(arguments.json, command, arguments.threads, arguments.quick, arguments.seed)
        return
    torch.set_num_threads(arguments.threads)
    checkout = arguments.reference
    reference = official.load_official(checkout) if checkout else None
    facts = provenance(torch.device(arguments.device))
    facts["hardware"] |= vector_units()
    record = {
        "command": official.recorded_command(argv, {str(checkout): "OFFICIAL"} if checkout else {}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "peer_commit": official.commit(checkout) if checkout else None,
        "settings": {k: v for k, v in vars(arguments).items() if k not in UNRECORDED},
        "runs": [],
    }
    print(header(record, ENOUGH), flush=True)
    chosen = SUITE if arguments.suite else [(arguments.network, arguments.batch)]
    for network, batch in chosen:
        record["runs"].append(run(arguments, network, batch, reference))
        print(comparison_table(record["runs"][-1]), flush=True)
    if any(row["limit"] for one in record["runs"] for row in one["contestants"].values()):
        print(limits_table(record["runs"]))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
