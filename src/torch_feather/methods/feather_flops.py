"""Feather with the global backbone biased towards fewer multiply-adds, or less time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..allocation import FlopsBiased
from ..schedules import Schedule
from .feather import power, scaled_gradient
from .magnitude import Method, make_schedule

GAMMA = 0.25


def feather_flops(
    *,
    sparsity: float,
    gamma: float | None = GAMMA,
    budget: float | None = None,
    costs: Mapping[str, float] | None = None,
    example_input: Any = None,
    p: float = 3.0,
    theta: float | str = "auto",
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
) -> Method:
    """`feather` that ranks |w| / c^gamma, with c the multiply-adds that each weight makes.

    Source: the Feather supplement, section 6, names the idea; the formula is ours.

    Args:
        sparsity: final share of zeros.
        gamma: the bias, >= 0; 0 is `feather`. The default is our choice: a bias of 0.5 can leave
            little more than the classifier at 98 %.
        budget: instead, what the prunable weights may cost at the final sparsity: multiply-adds per
            sample, or the unit of `costs`. gamma is then the least that meets it, with the weights
            of each step. Another gamma beside it is an error; 0.25, the default, is taken for not
            given.
        costs: of a weight, by weight name: multiply-adds, or what
            `torch_feather.runtime.layer_milliseconds` measures.
        example_input: or an input of the network to count multiply-adds with.
        p, theta: as for `feather`.
        schedule, begin, end: as for `feather`.
    """
    if budget is not None and gamma == GAMMA:
        gamma = None
    return Method(
        operator=power(p),
        gradient=scaled_gradient(theta, sparsity),
        allocation=FlopsBiased(gamma, budget, costs, example_input),
        schedule=make_schedule(schedule, begin, end),
    )
