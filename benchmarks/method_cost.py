"""Cost of a step by method: nanoseconds per weight that each adds to a dense step.

Gradients pass through the backward pass of a product, and methods take turns.

    python benchmarks/method_cost.py --weights 2e6 1e7 --json results/method_cost.json

Methods with a schedule are at the final sparsity, `asl` is past its learning phase, and `spartan`
and `probmask` are in the middle of training.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
import torch
from official import recorded_command
from step_turns import FORMS, Weights, forms, sgd
from torch import nn

import torch_feather as feather
from torch_feather.training.provenance import provenance
from torch_feather.weights import compiled

METHODS = "feather-ham", "hard-ste", "soft-ste", "gmp", "st3", "asl", "str", "spartan", "probmask"
HALF = "feather, theta 0.5"
FEATHER: dict[str, dict[str, Any]] = {"feather": {}, HALF: {"theta": 0.5}}
SETTLE = 25
"""Steps before the measured ones, for brackets and momentum to settle."""


def make_step(
    model: nn.Module,
    gradients: list[torch.Tensor],
    method: str,
    options: dict[str, Any],
    sparsity: float,
    middle: int,
) -> Callable[[], float]:
    """Return a function that takes a step of a copy of the model and returns the seconds."""
    one = copy.deepcopy(model)
    optimizer = sgd(one.parameters())
    if method != "dense":
        if "schedule" in feather.methods.method_options(method):
            options = options | {"schedule": "constant"}
        total = {"asl": 2, "spartan": middle, "probmask": middle}.get(method, 10**6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", feather.FeatherWarning)
            feather.sparsify(
                one, optimizer, method, sparsity=sparsity, total_steps=total, **options
            )

    def step() -> float:
        optimizer.zero_grad()
        products = [p * 1.0 for p in one.parameters()]
        began = thread_time()
        torch.autograd.backward(products, gradients)
        optimizer.step()
        return thread_time() - began

    return step


def measure_methods(
    size: int,
    sparsity: float,
    entries: dict[str, dict[str, Any]],
    repetitions: int,
    seed: int,
    settle: int = SETTLE,
) -> dict[str, Any]:
    """Return nanoseconds per weight that each entry adds to a dense step, backward pass included.

    The time is that of the thread, of which a lower quantile is taken: other programs disturb it
    little.

    Args:
        size: number of weights.
        sparsity: the target.
        entries: options of the method by label, `method` or `method, remark`.
        repetitions: measured steps of each.
        seed: of weights, gradients and the order of steps.
        settle: steps before the measured ones.
    """
    torch.manual_seed(seed)
    model = Weights(size)
    gradients = [torch.randn_like(p) * 1e-2 for p in model.parameters()]
    size = sum(g.numel() for g in gradients)
    middle = 4 * (settle + repetitions)  # twice for each of two forms
    steps = {
        name: make_step(model, gradients, name.split(",")[0], options, sparsity, middle)
        for name, options in {"dense": {}, **entries}.items()
    }
    draw, real = random.Random(seed), compiled.kernels
    samples: dict[tuple[str, str], list[float]] = {}
    measured = forms()
    turns = [(name, form) for name in steps for form in measured]
    try:
        for i in range(settle + repetitions):
            for name, form in draw.sample(turns, len(turns)):
                compiled.kernels = FORMS[form] if form == "plain" else real
                elapsed = steps[name]()
                if i >= settle:
                    samples.setdefault((name, form), []).append(1e9 * elapsed / size)
    finally:
        compiled.kernels = real
    at = {turn: float(np.quantile(found, 0.1)) for turn, found in samples.items()}
    added = {
        name: {form: at[name, form] - at["dense", form] for form in measured} for name in entries
    }
    return {"weights": size, "sparsity": sparsity, "added_ns": added}


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
    for row in record["methods"]:
        added, measured = row["added_ns"], list(row["added_ns"]["feather"])
        lines.append(
            f"\n{row['weights']:,} weights, {row['sparsity']:.0%}: ns per weight, / feather"
        )
        for name, found in added.items():
            cells = [
                f"{found[form]:>9.2f} {found[form] / added['feather'][form]:>6.2f}"
                for form in measured
            ]
            lines.append(f"  {name:<20}" + "".join(cells) + f"   ({', '.join(measured)})")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=float, nargs="+", default=[2e6, 1e7])
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--steps", type=int, default=15, help="measured repetitions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to FILE")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    entries = FEATHER | {name: {} for name in METHODS}
    record: dict[str, Any] = {
        "command": recorded_command(argv, {}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **provenance(torch.device("cpu")),
        "engine": feather.engine_info(),
        "settings": {"sparsity": arguments.sparsity, "steps": arguments.steps},
        "methods": [
            measure_methods(int(size), arguments.sparsity, entries, arguments.steps, arguments.seed)
            for size in arguments.weights
        ],
    }
    text = describe(record)
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
        arguments.json.with_suffix(".txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
