"""Gradual magnitude pruning with the same sparsity in every layer, alone and as a backbone."""

from __future__ import annotations

from functools import partial

from ..allocation import Allocation
from ..gradient_rules import Masked
from ..operators import Hard
from ..patterns import Pattern
from ..schedules import Schedule, Stairs
from .feather import feather
from .magnitude import Method
from .options import make_allocation, make_method, make_schedule


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
    """Return gradual magnitude pruning: the smallest weights of each layer are zero.

    Pruned weights get no gradient. They keep their latent value, which momentum and weight decay
    still change, and return if the mask changes. Source: Zhu and Gupta (2017).

    Args:
        sparsity: final fraction of zeros in the whole network.
        every: steps between two changes of the sparsity. The mask follows the magnitudes at every
            step.
        allocation: as for `feather`. By default the first convolution stays dense and the other
            layers are sparser for it, as in Feather's experiments. 'uniform' prunes it too.
            'uniform-dense-depthwise' also keeps depthwise convolutions dense, as Zhu and Gupta do.
        schedule, begin, end, pattern: as for `feather`.

    Example:
        >>> gmp(sparsity=0.9).operator
        Hard()
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
feather_gmp.__doc__ = """Return `feather` with the allocation of `gmp`.

All layers have the same sparsity, except for the first convolution, which stays dense. Source: the
Feather supplement, section 4.

Example:
    >>> feather_gmp(sparsity=0.9).allocation
    Uniform(dense_first=True, dense_depthwise=False)
"""
