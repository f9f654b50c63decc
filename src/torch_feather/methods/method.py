"""What every method is made of."""

from __future__ import annotations

from dataclasses import dataclass

from ..allocation import Allocation
from ..errors import ConfigurationError
from ..gradients import GradientRule
from ..operators import Operator
from ..schedules import Constant, Cubic, Linear, OneShot, Schedule


@dataclass(frozen=True)
class Method:
    """Four independent parts; `repr` of a method identifies it in checkpoints."""

    operator: Operator
    gradient: GradientRule
    allocation: Allocation
    schedule: Schedule


def make_schedule(schedule: str | Schedule, begin: int, end: int | None) -> Schedule:
    """A schedule by name; `begin` and `end` are optimizer steps (see `schedules`)."""
    if not isinstance(schedule, str):
        if (begin, end) != (0, None):
            raise ConfigurationError(
                "begin and end belong to schedules given by name; set them on the Schedule object."
            )
        return schedule
    if schedule == "one-shot":
        return OneShot(begin)
    if schedule == "constant":
        return Constant()
    ramps = {"cubic": Cubic, "linear": Linear}
    if schedule not in ramps:
        raise ConfigurationError(
            f"schedule must be 'cubic', 'linear', 'constant', 'one-shot' or a Schedule object, "
            f"got {schedule!r}."
        )
    return ramps[schedule](begin, end)
