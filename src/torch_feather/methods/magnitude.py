"""What every method is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..allocation import ERK, Allocation, Global, Sigma, Uniform
from ..errors import ConfigurationError, nearest
from ..gradient_rules import GradientRule
from ..operators import Operator
from ..patterns import Pattern, Patterned, make_pattern
from ..schedules import Constant, Cubic, Linear, OneShot, Schedule
from .base import Reparametrization, Setting
from .thresholded import Scheduled


@dataclass(frozen=True)
class Method:
    """Four independent parts; `repr` of a method identifies it in checkpoints."""

    operator: Operator
    gradient: GradientRule
    allocation: Allocation
    schedule: Schedule

    def attach(self, setting: Setting) -> Reparametrization:
        """Puts the method to work on a model."""
        return Scheduled(setting, self)


@dataclass(frozen=True)
class PatternedMethod(Method):
    """A `Method` that prunes by a pattern, such as 2 of 4 neighbours or blocks."""

    pattern: Pattern

    def attach(self, setting: Setting) -> Patterned:
        """See `AnyMethod`."""
        return Patterned(setting, self)


def make_method(
    operator: Operator,
    gradient: GradientRule,
    allocation: Allocation,
    schedule: Schedule,
    pattern: str | Pattern | None,
) -> Method:
    """A method of these parts, by a pattern where one is given."""
    if pattern is None:
        return Method(operator, gradient, allocation, schedule)
    return PatternedMethod(operator, gradient, allocation, schedule, make_pattern(pattern))


class AnyMethod(Protocol):
    """All that the engine needs of a method; `Method` and `LearnedMethod` are two."""

    def attach(self, setting: Setting) -> Reparametrization:
        """Puts the method to work on a model.

        Raises:
            ConfigurationError: it cannot be; the message says why and what to do.
        """


ALLOCATIONS: dict[str, Allocation] = {
    "global": Global(),
    "uniform": Uniform(),
    "uniform-dense-first": Uniform(dense_first=True),
    "uniform-dense-depthwise": Uniform(dense_first=True, dense_depthwise=True),
    "erk": ERK(),
    "sigma": Sigma(),
}


def make_allocation(
    allocation: str | Allocation, min_density: float = 0.0, max_density: float = 1.0
) -> Allocation:
    """An allocation by name, or the object itself; the bounds are those of `Global`."""
    if allocation == "global":
        return Global(min_density, max_density)
    if (min_density, max_density) != (0.0, 1.0):
        raise ConfigurationError(
            f"min_density and max_density belong to allocation='global', not to {allocation!r}; "
            "leave them out, or set them on a Global object."
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


SCHEDULES = ("cubic", "linear", "constant", "one-shot")


def make_schedule(schedule: str | Schedule, begin: int, end: int | None) -> Schedule:
    """A schedule by name; `begin` and `end` are optimizer steps (see `schedules`)."""
    if not isinstance(schedule, str):
        if (begin, end) != (0, None):
            raise ConfigurationError(
                "begin and end belong to schedules given by name; set them on the Schedule object."
            )
        return schedule
    if schedule in ("one-shot", "constant"):
        if end is not None or (schedule == "constant" and begin != 0):
            raise ConfigurationError(
                f"schedule={schedule!r} does not rise over a while: 'constant' takes neither begin "
                f"nor end, 'one-shot' begin alone; got begin={begin}, end={end}."
            )
        return OneShot(begin) if schedule == "one-shot" else Constant()
    ramps = {"cubic": Cubic, "linear": Linear}
    if schedule not in ramps:
        raise ConfigurationError(
            f"There is no schedule {schedule!r}{nearest(schedule, SCHEDULES)} There are: "
            f"{', '.join(SCHEDULES)}, or any object of torch_feather.schedules."
        )
    return ramps[schedule](begin, end)
