"""What sparse training adds to a training step, beside the same network trained dense.

All contestants are copies of one network with the same initial weights. In every round each of
them takes one whole step (forward, backward, clip, optimizer) on the same new random batch, in an
order drawn for that round. `control` is a second dense copy: its ratio shows what the machine's
noise alone does. `official` is the official implementation on its own module wrappers.

    python benchmarks/step_overhead.py --network resnet20 --batch 16 --theta 1 .5
    python benchmarks/step_overhead.py --suite --peer ../feather --json results/step_overhead.json
    python benchmarks/step_overhead.py --method all --json results/method_overhead.json

Methods with an option `schedule` are at the final sparsity all the time (but see `--at`); the
others go through their whole course in the rounds measured. What the engine does in a step is
measured in the third quarter of a course apart, where no method is in its last phase yet.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import official
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.methods import method_options
from torch_feather.prunable import find_prunable
from torch_feather.training.provenance import provenance
from torch_feather.weights.checksum import checksum
from torch_feather.weights.latent import copy_all

CLASSES = 100
WARMUP = 3  # rounds before those that count: memory is allocated, kernels are chosen
ENOUGH = 40  # rounds; fewer are a trial, not a measurement
ENGINE_REPEATS = 20
ENGINE_BATCH = 8  # images, at most: what the engine does in a step does not depend on them
RESAMPLES = 2000
CACHES = 64 << 20  # bytes; more than the caches hold

SIMD = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve")

# What the project promises at 95 %, on two cores. Of feather: by network, batch and theta.
LIMITS = {
    ("resnet20", 128): {1.0: 1.03, 0.5: 1.05},
    ("mobilenet_v1", 128): {1.0: 1.06, 0.5: 1.08},
    ("resnet20", 16): {1.0: 1.08, 0.5: 1.10},
}
# Of every other method with its defaults: by network and batch, and where one has its own.
METHOD_LIMITS = {("resnet20", 128): 1.10}
OWN_LIMITS = {"spartan": 1.30}


class Contestant:
    """A copy of the network, its optimizer, and whatever makes it sparse."""

    def __init__(self, model: nn.Module, amp: bool = False) -> None:
        self.model, self.amp = copy.deepcopy(model), amp
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4
        )
        self.before_forward: Callable[[], object] = lambda: None
        self.sparsifier: feather.Sparsifier | None = None
        self.limit: float | None = None

    def step(self, x: Tensor, y: Tensor) -> None:
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
    peer: ModuleType | None,
    total: int | None = None,
) -> tuple[nn.Module, dict[str, Contestant]]:
    """All contestants by name, `dense` first; their course is as long as the race, or `total`."""
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    model = feather.models.create(network, CLASSES).to(device).to(memory_format=layout)
    found = {"dense": Contestant(model, arguments.amp), "control": Contestant(model, arguments.amp)}
    total = total or WARMUP + arguments.steps
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
        if (arguments.sparsity, arguments.device) == (0.95, "cpu"):
            one.limit = limit(method, network, batch, effective)
        # A method without theta is there once, whatever the list of them.
        found[method if effective is None else f"{method}, θ {effective:g}"] = one

    if peer is not None:
        one = found["official"] = Contestant(model, arguments.amp)
        # At the end: the second half of a schedule, which is at its final sparsity from there on.
        at_end = arguments.at == "end"
        pruner = official.wrap(
            peer,
            one.model,
            device,
            sparsity=arguments.sparsity,
            steps_per_epoch=2 * total if at_end else total,
            epochs=1,
        )
        pruner.step_idx = total if at_end else 0
        one.before_forward = pruner.update_thresh
    return model, found


def limit(method: str, network: str, batch: int, theta: float | None) -> float | None:
    """The promised ratio to the dense step; None where nothing is promised."""
    if method == "feather":
        return LIMITS.get((network, batch), {}).get(theta)
    common = METHOD_LIMITS.get((network, batch))
    return None if common is None else OWN_LIMITS.get(method, common)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until its work is done."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def race(
    contestants: dict[str, Contestant],
    rounds: int,
    shape: Sequence[int],
    device: torch.device,
    channels_last: bool,
    seed: int,
) -> dict[str, list[float]]:
    """Milliseconds of each contestant's step in each round."""
    draw = random.Random(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(WARMUP + rounds):
        x = torch.randn(*shape, device=device).contiguous(memory_format=layout)
        y = torch.randint(CLASSES, (shape[0],), device=device)
        for name in draw.sample(list(contestants), len(contestants)):
            elapsed = timed(partial(contestants[name].step, x, y), device)
            if i >= WARMUP:
                samples[name].append(elapsed)
    return samples


def compare(samples: dict[str, list[float]], seed: int) -> dict[str, dict[str, Any]]:
    """Medians and their ratios to `dense`.

    The interval (95 %) resamples whole rounds, so what slows all of a round cancels in it.
    """
    times = {name: np.asarray(values) for name, values in samples.items()}
    dense = times["dense"]
    rounds = np.random.default_rng(seed).integers(len(dense), size=(RESAMPLES, len(dense)))
    result = {}
    for name, values in times.items():
        ratios = np.median(values[rounds], axis=1) / np.median(dense[rounds], axis=1)
        result[name] = {
            "median_ms": float(np.median(values)),
            "quartiles_ms": np.quantile(values, [0.25, 0.75]).tolist(),
            "ratio": float(np.median(values) / np.median(dense)),
            "interval": np.quantile(ratios, [0.025, 0.975]).tolist(),
            "ratio_of_means": float(values.mean() / dense.mean()),
        }
    return result


def engines(arguments: argparse.Namespace, network: str, batch: int) -> dict[str, dict[str, Any]]:
    """`engine` of each method, in the third quarter of a course of its own."""
    device, size = torch.device(arguments.device), arguments.size
    half = 2 * (WARMUP + ENGINE_REPEATS + 1)  # twice the steps that `engine` takes
    _, contestants = build(arguments, network, batch, None, total=2 * half)
    sparse = {name: one for name, one in contestants.items() if one.sparsifier is not None}
    shape = (min(batch, ENGINE_BATCH), 3, size, size)
    race(sparse, half - WARMUP, shape, device, arguments.channels_last, arguments.seed)
    return {name: engine(one.sparsifier, device) for name, one in sparse.items() if one.sparsifier}


def engine(sparsifier: feather.Sparsifier, device: torch.device) -> dict[str, Any]:
    """Milliseconds (medians) of what the engine does in one step, and the memory it takes.

    Measured apart from training, with the caches emptied before each part, as forward and
    backward leave them. `refresh` (thresholds), `image`, `copy` and `checks` are parts of the calls
    above.
    """
    weights, method = sparsifier.step.training.weights, sparsifier.step.training.method
    every = range(len(sparsifier.step.training.binding.weights))
    parameters = [slot.parameter for slot in sparsifier.step.training.binding.weights]
    step = torch.tensor(sparsifier.step_count, device=device)
    images, _ = method.images(weights)
    spare = [torch.empty_like(image) for image in images]
    hooks = [
        (hook, torch.randn_like(p))
        for p in parameters
        for hook in (p._backward_hooks or {}).values()
    ]

    calls = {
        "complete": lambda: sparsifier.complete_at_step(None),
        "before_step": lambda: sparsifier.before_step(every),
        "capture": lambda: sparsifier.capture(every),
        "after_step": lambda: sparsifier.after_step(True),
        "pull_back": lambda: [hook(gradient) for hook, gradient in hooks],
    }
    parts = {
        "refresh": lambda: method.refresh(weights, step),
        "image": lambda: method.images(weights),
        "copy": lambda: copy_all(spare, images),  # into the parameters it would be a foreign write
    }
    if device.type == "cpu":
        parts["checks"] = lambda: [checksum(p) for p in parameters]
    caches = torch.empty(CACHES // 4, device=device)
    samples: dict[str, list[float]] = {name: [] for name in calls | parts}
    with torch.no_grad():
        for i in range(WARMUP + ENGINE_REPEATS):
            for name, call in (calls | parts).items():
                caches.fill_(i)
                elapsed = timed(call, device)
                if i >= WARMUP:
                    samples[name].append(elapsed)
    medians = {name: float(np.median(values)) for name, values in samples.items()}
    return {
        "ms": {name: medians[name] for name in calls},
        "sum_ms": sum(medians[name] for name in calls),
        "parts_ms": {name: medians[name] for name in parts},
        "memory": memory(sparsifier, device),
    }


def memory(sparsifier: feather.Sparsifier, device: torch.device) -> dict[str, int]:
    """Bytes of the prunable weights, of their latent copy and of what the method keeps beside it
    between steps, and of a step's transients."""
    every = range(len(sparsifier.step.training.binding.weights))

    def step() -> None:
        sparsifier.before_step(every)
        sparsifier.capture(every)
        sparsifier.after_step(True)

    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        transient = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks on stderr
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            step()
        assert profile.profiler is not None
        events = profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        transient = max(np.cumsum([0, *(change for _, change in changes)]).tolist())
    size = sum(
        s.parameter.numel() * s.parameter.element_size()
        for s in sparsifier.step.training.binding.weights
    )
    latent = sum(
        flat.numel() * flat.element_size() for flat in sparsifier.step.training.weights.flats
    )
    sparsifier.step.training.method.forget_gradients()  # the next step's are new
    kept = sum(storages(vars(sparsifier.step.training.method)).values())
    return {"weights": size, "latent": latent, "method": kept, "transient": int(transient)}


def storages(held: object) -> dict[int, int]:
    """Bytes of each storage, by its address, that tensors in nested containers lie in."""
    if isinstance(held, Tensor):
        storage = held.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    parts = list(held.values()) if isinstance(held, dict) else held
    if not isinstance(parts, list | tuple):
        return {}
    return {address: size for part in parts for address, size in storages(part).items()}


def run(
    arguments: argparse.Namespace, network: str, batch: int, peer: ModuleType | None
) -> dict[str, Any]:
    """One network at one batch size: everything that the record holds of it."""
    device = torch.device(arguments.device)
    model, contestants = build(arguments, network, batch, peer)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    shape = (batch, 3, arguments.size, arguments.size)
    with warnings.catch_warnings():
        # A layer of an untrained network may be empty at the final sparsity.
        warnings.simplefilter("ignore", feather.FeatherWarning)
        samples = race(
            contestants, arguments.steps, shape, device, arguments.channels_last, arguments.seed
        )
        engine_rows = engines(arguments, network, batch)
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
    """What vector instructions the CPU has (on Linux), and the set that PyTorch chose."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    return {
        "simd": [name for name in SIMD if name in flags],
        "simd_used": torch.backends.cpu.get_cpu_capability(),
    }


def header(record: dict[str, Any]) -> str:
    hardware, settings = record["hardware"], record["settings"]
    where = (
        f"{hardware['cpu']}, {hardware['cores']} core(s), {hardware['threads']} thread(s), "
        f"{' '.join(hardware['simd'])}; PyTorch uses {hardware['simd_used']}"
    )
    if "gpu" in hardware:
        where = f"{hardware['gpu']}; {where}"
    lines = [
        where,
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        f"commit {record['commit'] or 'unknown'}, {record['date']}",
    ]
    if record["peer_commit"]:
        lines.append(f"official implementation at {record['peer_commit']}")
    where_in_schedule = "at the final" if settings["at"] == "end" else "while rising to the final"
    lines += [
        record["command"],
        f"{settings['steps']} rounds {where_in_schedule} sparsity {settings['sparsity']:.2%}; "
        "of methods without the option schedule, over their whole course",
    ]
    if settings["steps"] < ENOUGH:
        lines.append(f"(fewer than {ENOUGH} rounds: a trial, not a measurement)")
    return "\n".join(lines)


def comparison_table(result: dict[str, Any]) -> str:
    load = "" if result["load_before"] is None else f", load before {result['load_before']:.1f}"
    lines = [
        f"\n{result['network']}, batch {result['batch']}, {result['prunable']:,} prunable weights"
        f"{load}",
        f"  {'':<18} {'median ms':>10} {'quartiles':>17} {'/ dense':>8} {'95 % interval':>15}"
        f" {'of means':>9} {'limit':>6}",
    ]
    for name, row in result["contestants"].items():
        low, high = row["quartiles_ms"]
        interval = f"{row['interval'][0]:.3f}-{row['interval'][1]:.3f}"
        limit = f"{row['limit']:.2f}" if row["limit"] else ""
        lines.append(
            f"  {name:<18} {row['median_ms']:>10.1f} {f'{low:.1f}-{high:.1f}':>17}"
            f" {row['ratio']:>8.3f} {interval:>15} {row['ratio_of_means']:>9.3f} {limit:>6}"
        )
    for name, row in result["engine"].items():
        calls = ", ".join(f"{key} {value:.2f}" for key, value in row["ms"].items())
        parts = ", ".join(f"{key} {value:.2f}" for key, value in row["parts_ms"].items())
        copies = {key: value / row["memory"]["weights"] for key, value in row["memory"].items()}
        lines += [
            f"  engine of {name}, in mid-course: {row['sum_ms']:.2f} ms a step: {calls}",
            f"    of which, each time: {parts}",
            "    memory in copies of the prunable weights: "
            f"{copies['latent'] + copies['method']:.2f} kept ({copies['method']:.2f} by the "
            f"method), {copies['transient']:.2f} for a moment",
        ]
    return "\n".join(lines)


def limits_table(results: list[dict[str, Any]]) -> str:
    """What was promised, and whether it holds."""
    lines = [
        f"\n{'network':<14} {'batch':>5}  {'contestant':<16} {'/ dense':>8} {'limit':>6}"
        f" {'':<7} {'control':>8} {'official':>9} {'engine ms':>10}"
    ]
    for result in results:
        rows = result["contestants"]
        peer = f"{rows['official']['ratio']:.3f}" if "official" in rows else ""
        for name, row in rows.items():
            if row["limit"] is not None:
                verdict = "within" if row["ratio"] <= row["limit"] else "OVER"
                lines.append(
                    f"{result['network']:<14} {result['batch']:>5}  {name:<16}"
                    f" {row['ratio']:>8.3f} {row['limit']:>6.2f} {verdict:<7}"
                    f" {rows['control']['ratio']:>8.3f} {peer:>9}"
                    f" {result['engine'][name]['sum_ms']:>10.2f}"
                )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    theta = lambda text: text if text == "auto" else float(text)  # noqa: E731
    parser.add_argument("--suite", action="store_true", help="the networks with a promised limit")
    parser.add_argument("--network", default="resnet20", help="a name, or timm/NAME")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--method", nargs="+", default=["feather"], help="names, or all")
    parser.add_argument("--theta", type=theta, nargs="+", help="[auto; with --suite 1 .5]")
    parser.add_argument("--steps", type=int, default=ENOUGH, help="rounds that count")
    parser.add_argument(
        "--at",
        choices=["end", "ramp"],
        default="end",
        help="at the final sparsity, or over a cubic schedule from its beginning",
    )
    parser.add_argument("--peer", type=Path, help="a checkout of the official implementation")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--channels-last", action="store_true", help="memory layout of the copies")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    arguments = parser.parse_args(argv)
    for name in ("batch", "size", "steps", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device")
    if "all" in arguments.method:
        arguments.method = feather.available_methods()
    for name in arguments.method:
        if name not in feather.available_methods():
            parser.error(f"--method {name}: there are {', '.join(feather.available_methods())}")
    if arguments.theta is None:
        arguments.theta = [1.0, 0.5] if arguments.suite else ["auto"]
    if arguments.suite and arguments.json is None:
        arguments.json = Path("results/step_overhead.json")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    peer = official.load_official(arguments.peer) if arguments.peer else None
    device = torch.device(arguments.device)
    facts = provenance(device)
    facts["hardware"] |= vector_units()
    peer_name = {str(arguments.peer): "OFFICIAL"} if arguments.peer else {}
    record = {
        "command": official.recorded_command(argv, peer_name),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "peer_commit": official.commit(arguments.peer) if arguments.peer else None,
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("json", "peer")},
        "runs": [],
    }
    print(header(record), flush=True)
    chosen = list(LIMITS) if arguments.suite else [(arguments.network, arguments.batch)]
    for network, batch in chosen:
        record["runs"].append(run(arguments, network, batch, peer))
        print(comparison_table(record["runs"][-1]), flush=True)
    if any(row["limit"] for one in record["runs"] for row in one["contestants"].values()):
        print(limits_table(record["runs"]))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
