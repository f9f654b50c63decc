"""Feather with the global backbone biased towards fewer multiply-adds, or less time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..allocation import FlopsBiased
from ..gradient_rules import Schedule as ThetaSchedule
from ..schedules import Schedule
from .magnitude import Method
from .options import make_gradient, make_operator, make_schedule

GAMMA = 0.25


def feather_flops(
    *,
    sparsity: float,
    gamma: float | None = None,
    budget: float | None = None,
    costs: Mapping[str, float] | None = None,
    example_input: Any = None,
    p: float = 3.0,
    theta: float | str | ThetaSchedule = "auto",
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
) -> Method:
    """Return `feather` with the ranking |w| / c^gamma, with c the multiply-adds of a weight.

    Source: the Feather supplement, section 6, mentions a bias. The formula is an addition of this
    package.

    Args:
        sparsity: final fraction of zeros.
        gamma: the bias, >= 0; 0 is `feather`. None: 0.25 without a budget. With a bias of 0.5,
            little more than the classifier can remain at 98%.
        budget: maximum cost of the prunable weights at the final sparsity, in multiply-adds per
            sample or the unit of `costs`. After each step, gamma becomes the smallest bias that
            meets the budget with the present weights, so gamma cannot be given too.
        costs: cost of a weight, by name of its tensor: multiply-adds, or a time as
            `torch_feather.runtime.layer_milliseconds` measures it.
        example_input: instead of `costs`, an input of the network to count multiply-adds with.
        p, theta, schedule, begin, end: as for `feather`.

    Raises:
        ConfigurationError: options that contradict each other.

    Example:
        >>> feather_flops(sparsity=0.9, gamma=0.5, costs={"0.weight": 64.0}).allocation
        FlopsBiased(gamma=0.5, budget=None)
    """
    if budget is None and gamma is None:
        gamma = GAMMA
    return Method(
        operator=make_operator(p),
        gradient=make_gradient(theta, sparsity),
        allocation=FlopsBiased(gamma, budget, costs, example_input),
        schedule=make_schedule(schedule, begin, end),
    )
