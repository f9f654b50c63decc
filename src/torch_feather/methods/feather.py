"""Feather, by default with the global pruning backbone."""

from __future__ import annotations

from ..allocation import Allocation
from ..gradient_rules import Schedule as ThetaSchedule
from ..patterns import Pattern
from ..schedules import Schedule
from .magnitude import Method
from .options import make_allocation, make_gradient, make_method, make_operator, make_schedule


def feather(
    *,
    sparsity: float,
    p: float = 3.0,
    theta: float | str | ThetaSchedule = "auto",
    allocation: str | Allocation = "global",
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
    min_density: float = 0.0,
    max_density: float = 1.0,
    pattern: str | Pattern | None = None,
) -> Method:
    """Return Feather: thresholding between soft and hard, scaled gradients for pruned weights.

    Source: Feather (BMVC 2023), sections 3 and 4.1, and its public code for theta's rule.

    Args:
        sparsity: final fraction of zeros.
        p: exponent of the threshold, >= 1; `math.inf` for the hard threshold.
        theta: factor on the gradient of pruned weights, in [0, 1]: a number, a schedule such as
            `gradient_rules.Linear(1.0, 0.0)` or 'linear(1, 0)', or 'auto': 0.5 if the final
            sparsity exceeds 0.95, otherwise 1.
        allocation: how the sparsity is divided among the layers: 'global' (the paper's),
            'uniform', 'uniform-dense-first', 'uniform-dense-depthwise', 'erk', 'sigma', or an
            object of `torch_feather.allocation`.
        schedule: 'cubic' (the paper's), 'linear', 'constant', 'one-shot' (at step `begin`), or an
            object of `torch_feather.schedules`.
        begin, end: steps between which the sparsity rises; `end` defaults to half of training.
        min_density, max_density: bounds on the density of each layer for 'global'. The paper has no
            bounds.
        pattern: '2:4' keeps 2 of each 4 neighbours, '4x4' prunes blocks of 4 outputs by 4 inputs;
            or an object of `torch_feather.patterns`. The paper has no patterns.

    Example:
        >>> feather(sparsity=0.98).gradient
        StraightThrough(theta=0.5)
    """
    return make_method(
        operator=make_operator(p),
        gradient=make_gradient(theta, sparsity),
        allocation=make_allocation(allocation, min_density, max_density),
        schedule=make_schedule(schedule, begin, end),
        pattern=pattern,
    )
