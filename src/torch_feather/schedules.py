"""How sparse the network is at step t.

A schedule is a table of `total_steps + 1` numbers, made once on the host in float64: entry t is
the share of the final target in force after t optimizer steps. It stays at its last entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigurationError


class Schedule(Protocol):
    """Share of the final sparsity over time."""

    def table(self, total_steps: int) -> Tensor:
        """Shares in [0, 1] after 0 .. total_steps steps, float64 of shape (total_steps + 1,)."""


def make_table(schedule: Schedule, total_steps: int) -> np.ndarray:
    """The schedule's table, checked: it may come from anyone."""
    table = np.asarray(schedule.table(total_steps), dtype=np.float64)
    if (
        table.shape != (total_steps + 1,)
        or not ((table >= 0) & (table <= 1)).all()
        or table[-1] != 1.0
    ):
        raise ConfigurationError(
            f"{schedule!r} must give a table of total_steps + 1 = {total_steps + 1} numbers in "
            "[0, 1] of which the last is 1."
        )
    return table


def count_steps(found: Any, *names: str) -> None:
    """These fields of a frozen dataclass become whole numbers; None stays."""
    for name in names:
        value = getattr(found, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not float(value).is_integer():
            raise ConfigurationError(
                f"{type(found).__name__}: {name} is a number of optimizer steps, not a share of "
                f"training; got {value!r}. Half of training is total_steps // 2."
            )
        object.__setattr__(found, name, int(float(value)))


@dataclass(frozen=True)
class _Ramp:
    """0 until `begin`, 1 from `end` on, `shape` of the elapsed share between. Both in steps."""

    begin: int = 0
    end: int | None = None  # None: half of total_steps

    def __post_init__(self) -> None:
        count_steps(self, "begin", "end")

    def shape(self, elapsed: Tensor) -> Tensor:
        raise TypeError("use Cubic or Linear")

    def table(self, total_steps: int) -> Tensor:
        """See `Schedule`."""
        end = total_steps // 2 if self.end is None else self.end
        if self.begin < 0 or (end <= self.begin and (self.end is not None or self.begin > 0)):
            raise ConfigurationError(
                f"The schedule must begin before it ends: begin={self.begin}, end={end} "
                f"(steps, of {total_steps}; end defaults to half of them)."
            )
        if end > total_steps:
            raise ConfigurationError(
                f"The schedule ends at step {end}, after the {total_steps} steps of training: the "
                "network would never reach its target."
            )
        t = torch.arange(total_steps + 1, dtype=torch.float64)
        elapsed = ((t - self.begin) / max(end - self.begin, 1)).clamp_(0, 1)
        return torch.where(t >= end, 1.0, self.shape(elapsed))


@dataclass(frozen=True)
class Cubic(_Ramp):
    """1 - (1 - x)^3 over the elapsed share x of [begin, end]: fast first, then ever slower.

    Source: Zhu and Gupta (2017), equation 1; Feather uses begin = 0, end = half of training.
    """

    def shape(self, elapsed: Tensor) -> Tensor:
        """Share of the target at `elapsed`."""
        rest = 1.0 - elapsed
        return 1.0 - rest * rest * rest


@dataclass(frozen=True)
class Linear(_Ramp):
    """The elapsed share of [begin, end] itself."""

    def shape(self, elapsed: Tensor) -> Tensor:
        """Share of the target at `elapsed`."""
        return elapsed


@dataclass(frozen=True)
class Stairs:
    """Another schedule, followed in stairs of `every` steps from its begin on; it arrives no later.

    Source: Zhu and Gupta (2017), whose sparsity rises every 100 to 1000 steps.
    """

    schedule: Schedule
    every: int

    def __post_init__(self) -> None:
        count_steps(self, "every")

    def table(self, total_steps: int) -> Tensor:
        """See `Schedule`."""
        if self.every < 1:
            raise ConfigurationError(f"every is a number of steps >= 1, got {self.every!r}.")
        smooth = torch.as_tensor(self.schedule.table(total_steps))
        steps = torch.arange(total_steps + 1)
        begin = max(int((smooth > 0).int().argmax()) - 1, 0)  # the last at which it is 0
        start = begin + (steps - begin).clamp(min=0) // self.every * self.every
        return torch.where(smooth == 1, 1.0, smooth[start.minimum(steps)])


@dataclass(frozen=True)
class Constant:
    """The final sparsity from the first forward pass on."""

    def table(self, total_steps: int) -> Tensor:
        """See `Schedule`."""
        return torch.ones(total_steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class OneShot:
    """Dense until `at` steps were taken, at the final sparsity from then on."""

    at: int

    def __post_init__(self) -> None:
        count_steps(self, "at")

    def table(self, total_steps: int) -> Tensor:
        """See `Schedule`."""
        if not 0 <= self.at <= total_steps:
            raise ConfigurationError(
                f"One-shot pruning at step {self.at} is outside of training (0 to {total_steps})."
            )
        return (torch.arange(total_steps + 1) >= self.at).double()
