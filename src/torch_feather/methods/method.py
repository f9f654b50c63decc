"""What every method is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..allocation import Allocation
from ..errors import ConfigurationError, nearest
from ..gradients import GradientRule
from ..operators import Operator
from ..reparametrization import Reparametrization, Setting
from ..schedules import Constant, Cubic, Linear, OneShot, Schedule
from ..thresholded import Scheduled


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


class AnyMethod(Protocol):
    """All that the engine needs of a method; `Method` and `LearnedMethod` are two."""

    def attach(self, setting: Setting) -> Reparametrization:
        """Puts the method to work on a model.

        Raises:
            ConfigurationError: it cannot be; the message says why and what to do.
        """


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
