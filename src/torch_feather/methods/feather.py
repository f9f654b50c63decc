"""Feather, by default with the global pruning backbone."""

from __future__ import annotations

import math

from ..allocation import Allocation
from ..errors import ConfigurationError
from ..gradient_rules import StraightThrough
from ..operators import Hard, Operator, Power
from ..patterns import Pattern
from ..schedules import Schedule
from .magnitude import Method, make_allocation, make_method, make_schedule


def feather(
    *,
    sparsity: float,
    p: float = 3.0,
    theta: float | str = "auto",
    allocation: str | Allocation = "global",
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
    min_density: float = 0.0,
    max_density: float = 1.0,
    pattern: str | Pattern | None = None,
) -> Method:
    """A threshold between soft and hard; pruned weights get their gradient too, times theta.

    Source: Feather (BMVC 2023), sections 3 and 4.1, and its public code for theta's rule.

    Args:
        sparsity: final share of zeros.
        p: exponent of the threshold, >= 1; `math.inf` for the hard threshold.
        theta: factor on the gradient of pruned weights, in [0, 1]. 'auto': 0.5 where the final
            sparsity exceeds 0.95, else 1.
        allocation: how the sparsity is shared among the layers: 'global' (the paper's), 'uniform',
            'uniform-dense-first', 'uniform-dense-depthwise', 'erk', 'sigma', or an object of
            `torch_feather.allocation`.
        schedule: 'cubic' (the paper's), 'linear', 'constant', 'one-shot' (at step `begin`), or an
            object of `torch_feather.schedules`.
        begin, end: steps between which the sparsity rises; `end` defaults to half of training.
        min_density, max_density: bounds on the share kept in each layer by 'global'; the paper
            has none.
        pattern: '2:4' prunes 2 of each 4 neighbours, '4x4' blocks of 4 outputs by 4 inputs; or an
            object of `torch_feather.patterns`. The paper has none.
    """
    return make_method(
        operator=power(p),
        gradient=scaled_gradient(theta, sparsity),
        allocation=make_allocation(allocation, min_density, max_density),
        schedule=make_schedule(schedule, begin, end),
        pattern=pattern,
    )


def power(p: float) -> Operator:
    """Feather's threshold with exponent p, hard for `math.inf`."""
    return Hard() if p == math.inf else Power(p)


def scaled_gradient(theta: float | str, sparsity: float) -> StraightThrough:
    """Feather's gradient rule; 'auto' is 0.5 where the final sparsity exceeds 0.95, else 1."""
    if theta == "auto":
        theta = 0.5 if sparsity > 0.95 else 1.0
    if isinstance(theta, str):
        raise ConfigurationError(f"theta must be 'auto' or a number in [0, 1], got {theta!r}.")
    return StraightThrough(float(theta))
