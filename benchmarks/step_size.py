"""Cost of a sparse step over the number of weights, and relative to dense steps of large networks.

Plain (NumPy) and compiled passes are measured in one run, with a dense control.

    python benchmarks/step_size.py --weights 1e5 1e6 1e7 1e8 --json results/step_size.json \\
        --plot results/step_size.svg
    python benchmarks/step_size.py --networks --json results/step_networks.json
    python benchmarks/step_size.py --weights 2e6 1e7 --methods --sparsity .95 --steps 40

With `--methods`, gradients pass through the backward pass of a product, and methods take turns.

With `--weights`, only the optimizer's step is taken, with given gradients: the numbers are
nanoseconds per weight that are added to the dense step. `copy` is the time of one copy of the
weights, the unit of the memory limit: a step needs at least three passes that read and write.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from official import recorded_command
from step_overhead import compare
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.training.provenance import provenance
from torch_feather.weights import compiled

WARMUP = 5
ROWS = 1000
LIMITS = {
    "resnet18, 64 px, batch 32": {"plain": 1.12, "compiled": 1.06},
    "MLP, 25 million, batch 64": {},
    "transformer, 10 million, AdamW": {"plain": 1.10, "compiled": 1.10},
    "resnet20, batch 128": {"plain": 1.02, "compiled": 1.02},
    "mobilenet_v1, batch 128": {"plain": 1.03, "compiled": 1.03},
    "resnet20, batch 16": {"plain": 1.06, "compiled": 1.06},
}
"""Largest ratio to the dense step, at 95%."""
FORMS = {"plain": lambda: None, "compiled": compiled.kernels}


class Weights(nn.Module):
    """About `size` weights in several matrices, without a forward pass."""

    def __init__(self, size: int):
        super().__init__()
        count = min(20, max(1, size // 50_000))
        rows = min(ROWS, size // count)
        shape = (size // count // rows, rows)
        self.layers = nn.ModuleList(nn.Linear(*shape, bias=False) for _ in range(count))


class Transformer(nn.Module):
    """Six layers of 384 channels that predict the next of 256 tokens: 10 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 384)
        layer = nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True, dropout=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.layers = nn.TransformerEncoder(layer, 6)
        self.head = nn.Linear(384, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(x)).mean(1))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer of the paper's recipe."""
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)


def networks() -> dict[str, tuple[nn.Module, Tensor, Callable[[Any], torch.optim.Optimizer]]]:
    """Return models, inputs and optimizers by name."""
    create = feather.models.create
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3072, 6144), nn.ReLU(), nn.Linear(6144, 1024))
    tokens = torch.randint(256, (16, 64))
    return {
        "resnet18, 64 px, batch 32": (
            create("timm/resnet18", 100),
            torch.randn(32, 3, 64, 64),
            sgd,
        ),
        "MLP, 25 million, batch 64": (mlp, torch.randn(64, 3, 32, 32), sgd),
        "transformer, 10 million, AdamW": (Transformer(), tokens, torch.optim.AdamW),
        "resnet20, batch 128": (create("resnet20", 100), torch.randn(128, 3, 32, 32), sgd),
        "mobilenet_v1, batch 128": (create("mobilenet_v1", 100), torch.randn(128, 3, 32, 32), sgd),
        "resnet20, batch 16": (create("resnet20", 100), torch.randn(16, 3, 32, 32), sgd),
    }


def contestants(
    model: nn.Module, make: Callable[[Any], torch.optim.Optimizer], sparsity: float, rising: bool
) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    """Return copies of the model: dense, a dense control, and a sparse one for each form."""
    found = {}
    names = ["dense", "control", *(f for f in FORMS if f == "plain" or compiled.kernels())]
    for name in names:
        one = copy.deepcopy(model)
        optimizer = make(one.parameters())
        if name in FORMS:
            schedule = {} if rising else {"schedule": "constant"}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", feather.FeatherWarning)
                feather.sparsify(one, optimizer, sparsity=sparsity, total_steps=10**6, **schedule)
        found[name] = one, optimizer
    return found


def take_turns(
    steps: dict[str, Callable[[], object]], repetitions: int, seed: int
) -> dict[str, list[float]]:
    """Return the milliseconds of each contestant's step in each repetition, in random order.

    With one thread, the time is that of the thread, which other programs disturb less.
    """
    draw, real = random.Random(seed), compiled.kernels
    clock = thread_time if torch.get_num_threads() == 1 else perf_counter
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(WARMUP + repetitions):
        for name in draw.sample(list(steps), len(steps)):
            compiled.kernels = FORMS.get(name, real)
            began = clock()
            steps[name]()
            if i >= WARMUP:
                samples[name].append(1e3 * (clock() - began))
    compiled.kernels = real
    return samples


def measure_size(size: int, sparsity: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return nanoseconds per weight that a sparse optimizer step adds to a dense one."""
    torch.manual_seed(0)
    model = Weights(size)
    size = sum(p.numel() for p in model.parameters())
    pairs = contestants(model, sgd, sparsity, rising=False)
    for one, _ in pairs.values():
        for p in one.parameters():
            p.grad = torch.randn_like(p) * 1e-2
    # Small networks need more repetitions: one step takes less than the clock's noise.
    repetitions = arguments.steps * max(1, int(10**6 / size))
    samples = take_turns({n: o.step for n, (_, o) in pairs.items()}, repetitions, arguments.seed)
    source, target = torch.randn(size), torch.empty(size)
    copies = take_turns({"copy": lambda: target.copy_(source)}, repetitions, arguments.seed)
    dense = float(np.median(samples["dense"]))
    per_weight = 1e6 / size
    return {
        "weights": size,
        "sparsity": sparsity,
        "dense_ns": dense * per_weight,
        "control": float(np.median(samples["control"])) / dense,
        "copy_ns": float(np.median(copies["copy"])) * per_weight,
        "added_ns": {
            name: (float(np.median(samples[name])) - dense) * per_weight
            for name in samples
            if name in FORMS
        },
    }


METHODS = "hard-ste", "soft-ste", "gmp", "st3", "asl", "str", "spartan", "probmask"
SETTLE = 25
"""Steps before the measured ones, for brackets and momentum to settle."""


def measure_methods(size: int, sparsity: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return nanoseconds per weight that each method adds to a dense step, backward pass included.

    Methods with a schedule are at the final sparsity, `asl` is past its learning phase, and
    `spartan` and `probmask` are in the middle of training. The time is that of the thread, of
    which a lower quantile is taken: other programs disturb it little.
    """
    torch.manual_seed(0)
    model = Weights(size)
    gradients = [torch.randn_like(p) * 1e-2 for p in model.parameters()]
    size = sum(g.numel() for g in gradients)
    entries: dict[str, dict[str, Any]] = {"dense": {}, "feather": {}}
    entries["feather, theta 0.5"] = {"theta": 0.5}
    entries |= {name: {} for name in METHODS}
    steps: dict[str, Callable[[], float]] = {}
    for name, options in entries.items():
        one = copy.deepcopy(model)
        optimizer = sgd(one.parameters())
        method, known = name.split(",")[0], {}
        if method != "dense":
            known = feather.methods.method_options(method)
            options |= {"schedule": "constant"} if "schedule" in known else {}
            middle = 4 * (SETTLE + arguments.steps)  # twice for each of two forms
            total = {"asl": 2, "spartan": middle, "probmask": middle}.get(method, 10**6)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", feather.FeatherWarning)
                feather.sparsify(
                    one, optimizer, method, sparsity=sparsity, total_steps=total, **options
                )

        def step(one: nn.Module = one, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            products = [p * 1.0 for p in one.parameters()]
            began = thread_time()
            torch.autograd.backward(products, gradients)
            optimizer.step()
            return thread_time() - began

        steps[name] = step
    draw, real = random.Random(arguments.seed), compiled.kernels
    samples: dict[tuple[str, str], list[float]] = {}
    forms = [form for form in FORMS if form == "plain" or compiled.kernels()]
    turns = [(name, form) for name in steps for form in forms]
    for i in range(SETTLE + arguments.steps):
        for name, form in draw.sample(turns, len(turns)):
            compiled.kernels = FORMS[form] if form == "plain" else real
            elapsed = steps[name]()
            if i >= SETTLE:
                samples.setdefault((name, form), []).append(1e9 * elapsed / size)
    compiled.kernels = real
    at = {turn: float(np.quantile(found, 0.1)) for turn, found in samples.items()}
    added = {
        name: {form: at[name, form] - at["dense", form] for form in forms}
        for name in steps
        if name != "dense"
    }
    return {"weights": size, "sparsity": sparsity, "added_ns": added}


def measure_network(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return complete training steps of a network, relative to dense ones."""
    torch.manual_seed(0)
    model, x, make = networks()[name]
    y = torch.randint(100, (len(x),))
    pairs = contestants(model, make, arguments.sparsity[0], rising=False)

    def step(one: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(one(x), y).backward()
        optimizer.step()

    steps = {n: partial(step, *pair) for n, pair in pairs.items()}
    compared = compare(take_turns(steps, arguments.steps, arguments.seed), arguments.seed)
    for form, row in compared.items():
        row["limit"] = LIMITS[name].get(form)
    return {"network": name, "contestants": compared}


def draw_plot(record: dict[str, Any], file: Path) -> None:
    """Draw the added time over the number of weights, with the memory limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for sparsity, style in zip(record["settings"]["sparsity"], ("-", "--"), strict=False):
        rows = [row for row in record["sizes"] if row["sparsity"] == sparsity]
        for form in rows[0]["added_ns"]:
            axes.plot(
                [row["weights"] for row in rows], [row["added_ns"][form] for row in rows],
                style, marker="o", label=f"{form}, {100 * sparsity:g}%",
            )  # fmt: skip
    rows = [row for row in record["sizes"] if row["sparsity"] == record["settings"]["sparsity"][0]]
    axes.plot(
        [row["weights"] for row in rows], [3 * row["copy_ns"] for row in rows],
        ":", color="gray", label="three copies of the weights",
    )  # fmt: skip
    axes.set(xscale="log", xlabel="weights", ylabel="added time, ns per weight", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(file)


def describe(record: dict[str, Any]) -> str:
    """Return the table."""
    hardware = record["hardware"]
    lines = [
        f"{hardware['cpu']}, {record['engine']['threads']} thread(s), "
        f"passes: {record['engine']['passes']}",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        f"commit {record['commit'] or 'unknown'}, {record['date']}",
        record["command"],
    ]
    if record["sizes"]:
        lines.append(
            f"\n{'weights':>12} {'sparsity':>9} {'dense ns':>9} {'control':>8} {'copy ns':>8}"
            f" {'plain ns':>9} {'compiled ns':>12}"
        )
    for row in record["sizes"]:
        added = row["added_ns"]
        lines.append(
            f"{row['weights']:>12,} {row['sparsity']:>9.0%} {row['dense_ns']:>9.2f}"
            f" {row['control']:>8.3f} {row['copy_ns']:>8.2f} {added['plain']:>9.2f}"
            f" {added.get('compiled', float('nan')):>12.2f}"
        )
    for row in record["methods"]:
        added, forms = row["added_ns"], list(row["added_ns"]["feather"])
        lines.append(
            f"\n{row['weights']:,} weights, {row['sparsity']:.0%}: ns per weight, / feather"
        )
        for name, found in added.items():
            cells = [
                f"{found[form]:>9.2f} {found[form] / added['feather'][form]:>6.2f}"
                for form in forms
            ]
            lines.append(f"  {name:<20}" + "".join(cells) + f"   ({', '.join(forms)})")
    for one in record["networks"]:
        lines.append(f"\n{one['network']}")
        for name, row in one["contestants"].items():
            limit = f"limit {row['limit']:.2f}" if row["limit"] else ""
            low, high = row["interval"]
            lines.append(
                f"  {name:<10} {row['median_ms']:>9.1f} ms  {row['ratio']:.3f} of dense"
                f" (95% CI {low:.3f} to {high:.3f}) {limit}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=float, nargs="+", default=[], help="numbers of weights")
    parser.add_argument("--networks", nargs="*", metavar="NAME", help="networks; default: all")
    parser.add_argument("--methods", action="store_true", help="compare methods at each size")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.95, 0.5])
    parser.add_argument("--steps", type=int, default=15, help="measured repetitions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--plot", type=Path, help="draw the time over the size into this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {
        "command": recorded_command(argv, {}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **provenance(torch.device("cpu")),
        "engine": feather.engine_info(),
        "settings": {"sparsity": arguments.sparsity, "steps": arguments.steps},
        "sizes": [],
        "methods": [],
        "networks": [],
    }
    for sparsity in arguments.sparsity:
        for size in arguments.weights:
            kind = "methods" if arguments.methods else "sizes"
            measure = measure_methods if arguments.methods else measure_size
            record[kind].append(measure(int(size), sparsity, arguments))
    if arguments.networks is not None:
        for name in arguments.networks or list(LIMITS):
            record["networks"].append(measure_network(name, arguments))
    text = describe(record)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
        arguments.json.with_suffix(".txt").write_text(text + "\n")
    if arguments.plot:
        draw_plot(record, arguments.plot)


if __name__ == "__main__":
    main()
