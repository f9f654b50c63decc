"""Cost of a step over the number of weights: a part of `step_overhead.py`.

Only the optimizer's step is taken, with given gradients: the numbers are nanoseconds per weight
that are added to the dense step. `copy` is the time of one copy of the weights, the unit of the
memory limit: a step needs at least three passes that read and write.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from step_turns import FORMS, TARGET, Weights, contestants, forms, sgd, take_turns, with_interval
from torch import Tensor

SIZES = (10**5, 10**6, 10**7, 11 * 10**6, 10**8)
SPARSITIES = (0.95, 0.5)
"""The target, constant, and half density, while the schedule rises through it."""
LIMITED = 11 * 10**6
LIMITS = {0.95: {"plain": 5.0, "compiled": 2.2}, 0.5: {"plain": 9.0, "compiled": 5.0}}
"""Nanoseconds per weight that a step of `LIMITED` weights may add, by sparsity."""
THREADS_AIM = 1.6
"""How many times as fast two threads should be as one."""


def planned(size: int, quick: bool) -> tuple[int, int]:
    """Return how often contestants are created, and the repetitions each time.

    Where a copy lies in memory changes the time of all of its steps by some percent. So the mean
    is over copies. Small networks need more repetitions: a step takes little more than the clock's
    noise.
    """
    if quick:
        return 2, 2
    return 6 if size > 5 * 10**7 else 10, int(np.clip(1e8 / size, 4, 60))


def new_copies(
    model: Weights, gradients: list[Tensor], sparsity: float
) -> dict[str, Callable[[], object]]:
    """Return the optimizer steps of new copies of a model, by contestant."""
    gc.collect()  # networks of the last call, which refer to their sparsifiers and these to them
    pairs = contestants(model, sgd, sparsity)
    for one, _ in pairs.values():
        for p, gradient in zip(one.parameters(), gradients, strict=True):
            p.grad = gradient.clone()
    return {name: optimizer.step for name, (_, optimizer) in pairs.items()}


def turns_of_new_copies(
    model: Weights, gradients: list[Tensor], sparsity: float, repetitions: int, seed: int
) -> dict[str, np.ndarray]:
    """Return nanoseconds per weight in each repetition, by contestant."""
    per_weight = 1e6 / sum(g.numel() for g in gradients)
    samples = take_turns(new_copies(model, gradients, sparsity), repetitions, seed)
    return {name: per_weight * np.asarray(values) for name, values in samples.items()}


def measure_size(size: int, sparsity: float, quick: bool, seed: int) -> dict[str, Any]:
    """Return nanoseconds per weight that a sparse optimizer step adds to a dense one.

    Args:
        size: number of weights, which is rounded to whole matrices.
        sparsity: 0.95, or less while the schedule rises.
        quick: take two steps, which shows that the benchmark runs.
        seed: of weights, gradients and the order of steps.
    """
    placements, repetitions = planned(size, quick)
    torch.manual_seed(seed)
    random.seed(seed)
    model = Weights(size)
    gradients = [torch.randn_like(p) * 1e-2 for p in model.parameters()]
    weights = sum(g.numel() for g in gradients)
    rounds = [
        turns_of_new_copies(model, gradients, sparsity, repetitions, seed + i)
        for i in range(placements)
    ]
    source, target = torch.randn(weights), torch.empty(weights)
    copies = take_turns({"copy": lambda: target.copy_(source)}, repetitions, seed)["copy"]

    def over_copies(value: Callable[[dict[str, np.ndarray]], np.ndarray]) -> tuple[float, Any]:
        """Return the mean over new copies of the median over their repetitions, with 95% CI."""
        return with_interval(np.array([np.median(value(ns)) for ns in rounds]), seed, np.mean)

    ratio, interval = over_copies(lambda ns: ns["control"] / ns["dense"])
    limits = LIMITS[sparsity] if size == LIMITED else {}
    added = {}
    for form in forms():
        mean, between = over_copies(lambda ns, form=form: ns[form] - ns["dense"])
        added[form] = {"ns": mean, "interval": between, "limit": limits.get(form)}
    return {
        "weights": weights,
        "sparsity": sparsity,
        "repetitions": placements * repetitions,
        "dense_ns": over_copies(lambda ns: ns["dense"])[0],
        "control": {"ratio": ratio, "interval": interval},
        "copy_ns": 1e6 / weights * float(np.median(copies)),
        "added": added,
    }


def measure_threads(threads: int, quick: bool, seed: int) -> dict[str, Any]:
    """Return how many times as fast a step is with several threads as with one, by wall clock.

    For a form of the passes, this is the time that its step adds to a dense one. `copy` is a copy
    of the weights by PyTorch: what the memory of the machine allows.

    Args:
        threads: number of threads.
        quick: take two steps, which shows that the benchmark runs.
        seed: of weights, gradients and the order of steps.
    """
    size = 10**5 if quick else LIMITED
    placements, repetitions = planned(size, quick)
    torch.manual_seed(seed)
    random.seed(seed)
    model = Weights(size)
    gradients = [torch.randn_like(p) * 1e-2 for p in model.parameters()]
    source, target = torch.randn(size), torch.empty(size)
    gains, before = [], torch.get_num_threads()
    try:
        for i in range(placements):
            steps = {
                "copy": lambda: target.copy_(source),
                **new_copies(model, gradients, TARGET),
            }
            times = {}
            for count in (1, threads):
                torch.set_num_threads(count)
                samples = take_turns(steps, repetitions, seed + i, clock=perf_counter)
                times[count] = {name: np.asarray(values) for name, values in samples.items()}
                for form in forms():
                    times[count][form] -= times[count]["dense"]
            one, several = times[1], times[threads]
            gains.append({name: np.median(one[name]) / np.median(several[name]) for name in steps})
    finally:
        torch.set_num_threads(before)
    rows = {}
    for name in ("copy", "dense", *forms()):
        mean, interval = with_interval(np.array([gain[name] for gain in gains]), seed, np.mean)
        aim = THREADS_AIM if name in FORMS else None
        rows[name] = {"ratio": mean, "interval": interval, "aim": aim}
    return {
        "weights": sum(g.numel() for g in gradients),
        "repetitions": placements * repetitions,
        "threads": threads,
        "gains": rows,
    }


def draw_plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the added time over the number of weights, with the memory limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for sparsity, style in zip(SPARSITIES, ("-", "--"), strict=True):
        chosen = [row for row in rows if row["sparsity"] == sparsity]
        for form in [form for form in FORMS if all(form in row["added"] for row in chosen)]:
            axes.plot(
                [row["weights"] for row in chosen], [row["added"][form]["ns"] for row in chosen],
                style, marker="o", label=f"{form}, {100 * sparsity:g}%",
            )  # fmt: skip
    chosen = [row for row in rows if row["sparsity"] == SPARSITIES[0]]
    axes.plot(
        [row["weights"] for row in chosen], [3 * row["copy_ns"] for row in chosen],
        ":", color="gray", label="three copies of the weights",
    )  # fmt: skip
    axes.set(xscale="log", xlabel="weights", ylabel="added time, ns per weight", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(file)
