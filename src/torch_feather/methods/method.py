"""What every method is made of."""

from __future__ import annotations

from dataclasses import dataclass

from ..allocation import Allocation
from ..errors import ConfigurationError, nearest
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


SCHEDULES = ("cubic", "linear", "constant", "one-shot")


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
            f"There is no schedule {schedule!r}{nearest(schedule, SCHEDULES)} There are: "
            f"{', '.join(SCHEDULES)}, or any object of torch_feather.schedules."
        )
    return ramps[schedule](begin, end)
