"""Feather with hyperbolic aware minimization (HAM): a second, multiplicative step."""

from __future__ import annotations

from dataclasses import replace

from ..allocation import Allocation
from ..gradient_rules import Schedule as ThetaSchedule
from ..latent_updates import HAM
from ..patterns import Pattern
from ..schedules import Schedule
from .feather import feather
from .magnitude import Method


def feather_ham(
    *,
    sparsity: float,
    alpha: float = 20.0,
    beta: float = 0.0,
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
    """Return `feather` with a multiplicative step on the latent weights after each step.

    Source: HAM (arXiv 2506.02630), for dense and masked training. The combination with Feather and
    the default of alpha are additions of this package.

    Args:
        sparsity: final fraction of zeros.
        alpha, beta: strength and decay of the multiplicative step, as for `latent_updates.HAM`.
            Published: 200 and 1e-3.
        p, theta, allocation, schedule, begin, end, min_density, max_density, pattern: as for
            `feather`.

    Example:
        >>> feather_ham(sparsity=0.98).latent_update
        HAM(alpha=20.0, beta=0.0)
    """
    method = feather(
        sparsity=sparsity, p=p, theta=theta, allocation=allocation, schedule=schedule, begin=begin,
        end=end, min_density=min_density, max_density=max_density, pattern=pattern,
    )  # fmt: skip
    return replace(method, latent_update=HAM(alpha, beta))
