"""Gradual magnitude pruning: every layer equally sparse; alone, and as a backbone for Feather."""

from __future__ import annotations

from functools import partial

from ..allocation import Allocation
from ..gradient_rules import Masked
from ..operators import Hard
from ..patterns import Pattern
from ..schedules import Schedule, Stairs
from .feather import feather
from .magnitude import Method, make_allocation, make_method, make_schedule


def gmp(
    *,
    sparsity: float,
    every: int = 1,
    allocation: str | Allocation = "uniform-dense-first",
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
    pattern: str | Pattern | None = None,
) -> Method:
    """The smallest weights of each layer are zero; pruned weights get no gradient.

    They keep their value, decay, and return when the mask moves. Source: Zhu and Gupta (2017).

    Args:
        sparsity: final share of zeros in the whole network.
        every: steps between two changes of the sparsity. The mask follows the magnitudes at
            every step.
        allocation: as for `feather`. By default the first convolution stays dense and the other
            layers make up for it, as in Feather's experiments; 'uniform' prunes it like them,
            'uniform-dense-depthwise' spares depthwise convolutions, too, as its authors do.
        schedule, begin, end: as for `feather`.
        pattern: as for `feather`.
    """
    smooth = make_schedule(schedule, begin, end)
    return make_method(
        operator=Hard(),
        gradient=Masked(),
        allocation=make_allocation(allocation),
        schedule=smooth if every == 1 else Stairs(smooth, every),
        pattern=pattern,
    )


feather_gmp = partial(feather, allocation="uniform-dense-first")
feather_gmp.__doc__ = """`feather` with the layers of `gmp`: equally sparse, the first one dense.

Source: the Feather supplement, section 4.
"""
