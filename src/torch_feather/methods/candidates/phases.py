"""Feather with dense and sparse phases in turn."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigurationError
from ...schedules import Cubic
from ..feather import feather
from ..magnitude import Method


@dataclass(frozen=True)
class Phases:
    """A cubic rise, interrupted by less sparse phases; the end is at the target.

    Each of `count` phases begins at equal distances after the rise. In it the sparsity falls to
    `low` of the target, then rises again along a cubic curve until the phase ends.

    Source: AC/DC (Peste et al., arXiv 2106.12379) alternates dense and sparse phases. The rise
    within a phase is an addition of this package.

    Attributes:
        end: fraction of training after which the first rise ends.
        count: number of less sparse phases; with 0, the schedule is a cubic rise alone.
        low: fraction of the target at the begin of a phase; 0 is dense.
        last: fraction of training after which the target holds.

    Raises:
        ConfigurationError: not 0 < end < last <= 1, count < 0, or low is not in [0, 1].

    Example:
        >>> Phases(end=0.75, count=0, last=1.0).table(4).tolist() == Cubic(0, 3).table(4).tolist()
        True
        >>> Phases(end=0.25, count=1, low=0.5, last=0.75).table(8).tolist()
        [0.0, 0.875, 0.5, 0.7890625, 0.9375, 0.9921875, 1.0, 1.0, 1.0]
    """

    end: float = 0.25
    count: int = 2
    low: float = 0.9
    last: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.end < self.last <= 1 or self.count < 0 or not 0 <= self.low <= 1:
            raise ConfigurationError(
                f"Phases need 0 < end < last <= 1, count >= 0 and low in [0, 1]; got {self}."
            )

    def table(self, total_steps: int) -> Tensor:
        """Return the fractions after 0 .. total_steps steps, float64."""
        first, last = (max(round(x * total_steps), 1) for x in (self.end, self.last))
        table = Cubic(0, min(first, total_steps)).table(total_steps).clone()
        bounds = torch.linspace(first, last, self.count + 1).round().long().tolist()
        for start, stop in itertools.pairwise(bounds):
            if stop > start:
                t = torch.arange(stop - start, dtype=torch.float64) / (stop - start)
                table[start:stop] = 1 - (1 - self.low) * (1 - t) ** 3
        table[-1] = 1.0
        return table


def feather_phases(
    *,
    sparsity: float,
    end: float = 0.25,
    phases: int = 2,
    low: float = 0.9,
    last: float = 0.75,
    theta: float | str = "auto",
) -> Method:
    """Return `feather` with less sparse phases between the first rise and the end.

    Args:
        sparsity: final fraction of zeros.
        end, low, last: as for `Phases`.
        phases: the number of phases, `Phases.count`; `sparsify` has a `count` of its own.
        theta: as for `feather`.

    Example:
        >>> feather_phases(sparsity=0.98, phases=3).schedule
        Phases(end=0.25, count=3, low=0.9, last=0.75)
    """
    schedule = Phases(float(end), phases, float(low), float(last))
    return feather(sparsity=sparsity, theta=theta, schedule=schedule)
