"""Steps of several contestants in turns, and the comparison of their times."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.schedules import Cubic
from torch_feather.weights import compiled

RESAMPLES = 2000
ROWS = 1000
FORMS = {"plain": lambda: None, "compiled": compiled.kernels}
"""The forms of the passes of a step, by the kernels that they use."""

TARGET = 0.95
TRAINING_STEPS = 62_400
"""Steps of the CIFAR-100 recipe: 160 epochs of 390 batches."""


class Weights(nn.Module):
    """About `size` weights in several matrices, without a forward pass."""

    def __init__(self, size: int):
        super().__init__()
        count = min(20, max(1, size // 50_000))
        rows = min(ROWS, size // count)
        shape = (size // count // rows, rows)
        self.layers = nn.ModuleList(nn.Linear(*shape, bias=False) for _ in range(count))


@dataclass(frozen=True)
class RisingThrough:
    """The part of the recipe's cubic schedule that begins at a fraction of the target."""

    fraction: float

    def table(self, total_steps: int) -> Tensor:
        """Return the fractions after 0 .. total_steps steps."""
        table = Cubic(0, TRAINING_STEPS // 2).table(TRAINING_STEPS + total_steps)
        return table[int((table < self.fraction).sum()) :][: total_steps + 1]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer of the paper's recipe."""
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)


def forms() -> list[str]:
    """Return the forms that can be measured: without llvmlite, plain alone."""
    return [form for form in FORMS if form == "plain" or compiled.kernels()]


def contestants(
    model: nn.Module, make: Callable[[Any], torch.optim.Optimizer], sparsity: float = TARGET
) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    """Return copies of the model: dense, a dense control, and a sparse one for each form.

    At the target, the sparsity is constant. Below it, it rises to the target as in training. The
    order in which they are created, and so the memory that they get, is random.
    """
    found = {}
    schedule: Any = "constant" if sparsity == TARGET else RisingThrough(sparsity / TARGET)
    names = ["dense", "control", *forms()]
    for name in random.sample(names, len(names)):
        one = copy.deepcopy(model)
        optimizer = make(one.parameters())
        if name in FORMS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", feather.FeatherWarning)
                feather.sparsify(
                    one, optimizer, sparsity=TARGET, total_steps=TRAINING_STEPS, schedule=schedule
                )
        found[name] = one, optimizer
    return {name: found[name] for name in names}


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    repetitions: int,
    seed: int,
    warmup: int = 3,
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Return the milliseconds of each contestant's step in each repetition, in random order.

    With one thread and without a clock, the time is that of the thread, which other programs
    disturb less.
    """
    draw, real = random.Random(seed), compiled.kernels
    clock = clock or (thread_time if torch.get_num_threads() == 1 else perf_counter)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    try:
        for i in range(warmup + repetitions):
            for name in draw.sample(list(steps), len(steps)):
                compiled.kernels = FORMS.get(name, real)
                began = clock()
                steps[name]()
                if i >= warmup:
                    samples[name].append(1e3 * (clock() - began))
    finally:
        compiled.kernels = real
    return samples


def with_interval(
    values: np.ndarray, seed: int, statistic: Callable[..., Any] = np.median
) -> tuple[float, list[float]]:
    """Return a statistic of values, and its 95% CI from resampled values."""
    chosen = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    interval = np.quantile(statistic(values[chosen], 1), [0.025, 0.975]).tolist()
    return float(statistic(values)), interval


def compare(samples: Mapping[str, list[float]], seed: int) -> dict[str, dict[str, Any]]:
    """Return median times, and the median of the ratios to `dense` within each repetition.

    Within a repetition, slowdowns of the machine affect all contestants and cancel out. The 95% CI
    resamples repetitions.
    """
    times = {name: np.asarray(values) for name, values in samples.items()}
    dense = times["dense"]
    result = {}
    for name, values in times.items():
        ratio, interval = with_interval(values / dense, seed)
        result[name] = {
            "median_ms": float(np.median(values)),
            "quartiles_ms": np.quantile(values, [0.25, 0.75]).tolist(),
            "ratio": ratio,
            "interval": interval,
            "ratio_of_means": float(values.mean() / dense.mean()),
        }
    return result
