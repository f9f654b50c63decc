"""Gradual magnitude pruning: every layer equally sparse; alone, and as a backbone for Feather."""

from __future__ import annotations

from ..allocation import Uniform
from ..gradients import Masked
from ..operators import Hard
from ..schedules import Schedule, Stairs
from .feather import power, scaled_gradient
from .method import Method, make_schedule


def gmp(
    *,
    sparsity: float,
    every: int = 1,
    dense_first: bool = True,
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
) -> Method:
    """Hard threshold layer by layer; pruned weights get no gradient.

    They keep their value, decay, and return when the mask moves. Source: Zhu and Gupta (2017).

    Args:
        sparsity: final share of zeros in the whole network.
        every: steps between two changes of the sparsity. The mask follows the magnitudes at
            every step.
        dense_first: the first convolution stays dense and the other layers make up for it, as in
            Feather's experiments; False: it is pruned like the others.
        schedule, begin, end: as for `feather`.
    """
    smooth = make_schedule(schedule, begin, end)
    return Method(
        operator=Hard(),
        gradient=Masked(),
        allocation=Uniform(dense_first),
        schedule=smooth if every == 1 else Stairs(smooth, every),
    )


def feather_gmp(
    *,
    sparsity: float,
    p: float = 3.0,
    theta: float | str = "auto",
    dense_first: bool = True,
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
) -> Method:
    """Feather with the layer-wise uniform backbone.

    Source: the Feather supplement, section 4.

    Args:
        sparsity: final share of zeros in the whole network.
        p, theta: as for `feather`.
        dense_first: as for `gmp`.
        schedule, begin, end: as for `feather`.
    """
    return Method(
        operator=power(p),
        gradient=scaled_gradient(theta, sparsity),
        allocation=Uniform(dense_first),
        schedule=make_schedule(schedule, begin, end),
    )
