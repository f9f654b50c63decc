"""Schedules: the sparsity over the steps of training.

A schedule is a table of `total_steps + 1` numbers in float64, computed once on the host. Entry t is
the fraction of the final target after t optimizer steps. The last entry holds for all later steps.
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
    """The fraction of the final sparsity over time.

    Example:
        >>> class Square:
        ...     def table(self, total_steps):
        ...         return torch.linspace(0, 1, total_steps + 1, dtype=torch.float64) ** 2
        >>> Square().table(2).tolist()
        [0.0, 0.25, 1.0]
    """

    def table(self, total_steps: int) -> Tensor:
        """Return the fractions after 0 .. total_steps steps.

        Returns:
            float64 of shape (total_steps + 1,), values in [0, 1]; the last is 1.
        """


def make_table(schedule: Schedule, total_steps: int) -> np.ndarray:
    """Return the table of a schedule, checked.

    Args:
        schedule: any object with `table`.
        total_steps: optimizer steps of the whole training.

    Raises:
        ConfigurationError: there is no table, or it has another shape or values, or its last entry
            is not 1.

    Example:
        >>> make_table(Linear(0, 2), 4).tolist()
        [0.0, 0.5, 1.0, 1.0, 1.0]
    """
    if not callable(getattr(schedule, "table", None)):
        raise ConfigurationError(
            f"schedule must be a name, or an object with table(total_steps); got {schedule!r:.80}."
        )
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
    """Convert fields of a frozen dataclass that count steps to `int`; None stays.

    Args:
        found: the object, which is changed in place.
        *names: its fields.

    Raises:
        ConfigurationError: a value is not an integer.

    Example:
        >>> OneShot(at=10.0)  # calls count_steps(self, "at")
        OneShot(at=10)
    """
    for name in names:
        value = getattr(found, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not float(value).is_integer():
            raise ConfigurationError(
                f"{type(found).__name__}: {name} is a number of optimizer steps, not a fraction of "
                f"training; got {value!r}. Half of training is total_steps // 2."
            )
        object.__setattr__(found, name, int(float(value)))


@dataclass(frozen=True)
class _Ramp:
    """0 until step `begin`, 1 from step `end` on, `shape` in between.

    Attributes:
        begin: last step at which the fraction is 0.
        end: first step at which it is 1. None: half of total_steps.

    Raises:
        ConfigurationError: begin or end is not an integer. `table` raises it if they are not in
            order, or if end exceeds total_steps.
    """

    begin: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        count_steps(self, "begin", "end")

    def shape(self, elapsed: Tensor) -> Tensor:
        """Return the fraction of the target at `elapsed`, the completed fraction of the ramp."""
        raise TypeError("use Cubic or Linear")

    def table(self, total_steps: int) -> Tensor:
        """Return the fractions after 0 .. total_steps steps, float64."""
        end = total_steps // 2 if self.end is None else self.end
        if self.begin < 0 or (end <= self.begin and (self.end is not None or self.begin > 0)):
            raise ConfigurationError(
                f"The schedule must begin before it ends, got begin={self.begin}, end={end} of "
                f"{total_steps} steps (end defaults to half of them)."
            )
        if end > total_steps:
            raise ConfigurationError(
                f"The schedule ends at step {end}, after the {total_steps} steps of training, so "
                "the network would never reach its target. Lower end."
            )
        t = torch.arange(total_steps + 1, dtype=torch.float64)
        elapsed = ((t - self.begin) / max(end - self.begin, 1)).clamp_(0, 1)
        return torch.where(t >= end, 1.0, self.shape(elapsed))


@dataclass(frozen=True)
class Cubic(_Ramp):
    """1 - (1 - x)^3, with x the completed fraction of [begin, end]: fast first, then slower.

    Source: Zhu and Gupta (2017), equation 1. Feather uses begin = 0 and end = half of training.

    Attributes:
        begin: last step at which the fraction is 0.
        end: first step at which it is 1. None: half of total_steps.

    Example:
        >>> Cubic(0, 2).table(3).tolist()
        [0.0, 0.875, 1.0, 1.0]
    """

    def shape(self, elapsed: Tensor) -> Tensor:
        rest = 1.0 - elapsed
        return 1.0 - rest * rest * rest


@dataclass(frozen=True)
class Linear(_Ramp):
    """The completed fraction of [begin, end].

    Attributes:
        begin: last step at which the fraction is 0.
        end: first step at which it is 1. None: half of total_steps.

    Example:
        >>> Linear(0, 2).table(3).tolist()
        [0.0, 0.5, 1.0, 1.0]
    """

    def shape(self, elapsed: Tensor) -> Tensor:
        return elapsed


@dataclass(frozen=True)
class Stairs:
    """Follows another schedule in stairs of `every` steps; it reaches the target no later.

    Source: Zhu and Gupta (2017), whose sparsity rises every 100 to 1000 steps.

    Attributes:
        schedule: the schedule to follow.
        every: length of a stair in steps, from the begin of the schedule on.

    Raises:
        ConfigurationError: every is not an integer; `table` raises it if every is less than 1.

    Example:
        >>> Stairs(Linear(0, 4), every=2).table(4).tolist()
        [0.0, 0.0, 0.5, 0.5, 1.0]
    """

    schedule: Schedule
    every: int

    def __post_init__(self) -> None:
        count_steps(self, "every")

    def table(self, total_steps: int) -> Tensor:
        """Return the fractions after 0 .. total_steps steps, float64."""
        if self.every < 1:
            raise ConfigurationError(f"every must be a number of steps >= 1, got {self.every!r}.")
        smooth = torch.as_tensor(self.schedule.table(total_steps))
        steps = torch.arange(total_steps + 1)
        begin = max(int((smooth > 0).int().argmax()) - 1, 0)  # the last step at 0
        start = begin + (steps - begin).clamp(min=0) // self.every * self.every
        return torch.where(smooth == 1, 1.0, smooth[start.minimum(steps)])


@dataclass(frozen=True)
class Constant:
    """The final sparsity from the first forward pass on.

    Example:
        >>> Constant().table(2).tolist()
        [1.0, 1.0, 1.0]
    """

    def table(self, total_steps: int) -> Tensor:
        """Return the fractions after 0 .. total_steps steps, float64."""
        return torch.ones(total_steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class OneShot:
    """Dense before step `at`, at the final sparsity from then on.

    Attributes:
        at: optimizer step.

    Raises:
        ConfigurationError: at is not an integer; `table` raises it if at is outside of training.

    Example:
        >>> OneShot(at=1).table(2).tolist()
        [0.0, 1.0, 1.0]
    """

    at: int

    def __post_init__(self) -> None:
        count_steps(self, "at")

    def table(self, total_steps: int) -> Tensor:
        """Return the fractions after 0 .. total_steps steps, float64."""
        if not 0 <= self.at <= total_steps:
            raise ConfigurationError(
                f"One-shot pruning at step {self.at} is outside of training (0 to {total_steps})."
            )
        return (torch.arange(total_steps + 1) >= self.at).double()
