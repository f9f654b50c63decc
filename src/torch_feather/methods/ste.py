"""Plain straight-through estimators: the two ends of Feather's family of thresholds."""

from __future__ import annotations

import math

from ..schedules import Schedule
from .feather import feather
from .method import Method


def hard_ste(
    *,
    sparsity: float,
    theta: float = 1.0,
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
    min_density: float = 0.0,
    max_density: float = 1.0,
) -> Method:
    """Hard threshold, straight-through gradient; options as for `feather`.

    Source: the baseline 'Hard' of Feather (BMVC 2023).
    """
    return feather(
        sparsity=sparsity,
        p=math.inf,
        theta=theta,
        schedule=schedule,
        begin=begin,
        end=end,
        min_density=min_density,
        max_density=max_density,
    )


def soft_ste(
    *,
    sparsity: float,
    theta: float = 1.0,
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
    min_density: float = 0.0,
    max_density: float = 1.0,
) -> Method:
    """Soft threshold, straight-through gradient; options as for `feather`.

    Source: the baseline 'Soft' of Feather (BMVC 2023).
    """
    return feather(
        sparsity=sparsity,
        p=1.0,
        theta=theta,
        schedule=schedule,
        begin=begin,
        end=end,
        min_density=min_density,
        max_density=max_density,
    )
