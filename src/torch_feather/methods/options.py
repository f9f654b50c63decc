"""Parts of a method by name: allocations, schedules, operators and gradient rules."""

from __future__ import annotations

import math

from ..allocation import ERK, Allocation, Global, Sigma, Uniform
from ..errors import ConfigurationError, nearest
from ..gradient_rules import Schedule as ThetaSchedule
from ..gradient_rules import StraightThrough, make_theta
from ..operators import Hard, Operator, Power
from ..patterns import Pattern, make_pattern
from ..schedules import Constant, Cubic, Linear, OneShot, Schedule
from .magnitude import Method
from .patterned import PatternedMethod

ALLOCATIONS: dict[str, Allocation] = {
    "global": Global(),
    "uniform": Uniform(),
    "uniform-dense-first": Uniform(dense_first=True),
    "uniform-dense-depthwise": Uniform(dense_first=True, dense_depthwise=True),
    "erk": ERK(),
    "sigma": Sigma(),
}

SCHEDULES = ("cubic", "linear", "constant", "one-shot")


def make_allocation(
    allocation: str | Allocation, min_density: float = 0.0, max_density: float = 1.0
) -> Allocation:
    """Return an allocation by name, or the object itself.

    Args:
        allocation: a key of `ALLOCATIONS`, or an object.
        min_density, max_density: bounds of `Global`.

    Raises:
        ConfigurationError: an unknown name, or bounds for another allocation than 'global'.

    Example:
        >>> make_allocation("erk")
        ERK()
    """
    if allocation == "global":
        return Global(min_density, max_density)
    if (min_density, max_density) != (0.0, 1.0):
        raise ConfigurationError(
            f"min_density and max_density belong to allocation='global', not to {allocation!r}. "
            "Leave them out, or set them on a Global object."
        )
    if isinstance(allocation, Allocation):
        return allocation
    if allocation not in ALLOCATIONS:
        raise ConfigurationError(
            f"There is no allocation {allocation!r}{nearest(str(allocation), ALLOCATIONS)} There "
            f"are: {', '.join(ALLOCATIONS)}, or any object of torch_feather.allocation, such as "
            "FlopsBiased(gamma=0.5, example_input=x), which is 'flops^0.5' in feather train."
        )
    return ALLOCATIONS[allocation]


def make_schedule(schedule: str | Schedule, begin: int, end: int | None) -> Schedule:
    """Return a schedule by name, or the object itself.

    Args:
        schedule: one of `SCHEDULES`, or an object of `torch_feather.schedules`.
        begin, end: optimizer steps, for a schedule given by name.

    Raises:
        ConfigurationError: an unknown name, or steps that the schedule does not take.

    Example:
        >>> make_schedule("linear", 0, 100)
        Linear(begin=0, end=100)
    """
    if not isinstance(schedule, str):
        if (begin, end) != (0, None):
            raise ConfigurationError(
                "begin and end belong to schedules given by name. Set them on the Schedule object."
            )
        return schedule
    if schedule in ("one-shot", "constant"):
        if end is not None or (schedule == "constant" and begin != 0):
            raise ConfigurationError(
                f"schedule={schedule!r} has no ramp: 'constant' takes neither begin nor end, "
                f"'one-shot' takes begin alone; got begin={begin}, end={end}."
            )
        return OneShot(begin) if schedule == "one-shot" else Constant()
    ramps = {"cubic": Cubic, "linear": Linear}
    if schedule not in ramps:
        raise ConfigurationError(
            f"There is no schedule {schedule!r}{nearest(schedule, SCHEDULES)} There are: "
            f"{', '.join(SCHEDULES)}, or any object of torch_feather.schedules."
        )
    return ramps[schedule](begin, end)


def make_operator(p: float) -> Operator:
    """Return Feather's operator with exponent p, hard for `math.inf`.

    Args:
        p: at least 1; 1 is the soft threshold.

    Raises:
        ConfigurationError: p is below 1.

    Example:
        >>> make_operator(3.0)
        Power(p=3.0)
    """
    return Hard() if p == math.inf else Power(p)


def make_gradient(theta: float | str | ThetaSchedule, sparsity: float) -> StraightThrough:
    """Return Feather's gradient rule.

    Args:
        theta: a number, a schedule, text of either, or 'auto': 0.5 if `sparsity` exceeds 0.95,
            otherwise 1.
        sparsity: final fraction of zeros.

    Raises:
        ConfigurationError: theta is none of these.

    Example:
        >>> make_gradient("auto", 0.98)
        StraightThrough(theta=0.5)
    """
    if theta == "auto":
        return StraightThrough(0.5 if sparsity > 0.95 else 1.0)
    return StraightThrough(make_theta(theta))


def make_method(
    operator: Operator,
    gradient: StraightThrough,
    allocation: Allocation,
    schedule: Schedule,
    pattern: str | Pattern | None,
) -> Method:
    """Return a method of these parts.

    Args:
        operator, gradient, allocation, schedule: as for `Method`.
        pattern: as for `make_pattern`; None for no pattern.

    Example:
        >>> from torch_feather.gradient_rules import Masked
        >>> make_method(Hard(), Masked(), Global(), Cubic(), "2:4").pattern
        NM(n=2, m=4)
    """
    if pattern is None:
        return Method(operator, gradient, allocation, schedule)
    return PatternedMethod(operator, gradient, allocation, schedule, make_pattern(pattern))
