"""The callback that informs a logger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..callbacks import Callback
from ..checkpoint import RunDirectory
from ..config import Config, to_dict
from ..errors import RunError
from .base import LoggedRun, Logger, numbers


class LoggerCallback(Callback):
    """Sends the rows of a run to a logger: each row once, also if the run is resumed.

    Args:
        make: creates the logger; called for each run, as for the dense baseline.
        name: its name in warnings; None is that of `make`.

    Example:
        >>> class Print(Logger):
        ...     def log(self, step, metrics):
        ...         print(step, metrics)
        >>> callback = LoggerCallback(Print)
        >>> callback.begin(Config(), steps=20, done=0, run=RunDirectory("runs/a"))
        >>> callback.epoch({"step": 10, "train_loss": 0.5, "val_acc": None})
        10 {'train_loss': 0.5, 'step': 10}
        >>> callback.end()
    """

    optional = True

    def __init__(self, make: Callable[[], Logger], name: str | None = None) -> None:
        self.make = make
        self.name = name or make.__name__
        self.logger: Logger | None = None

    def begin(self, config: Config, steps: int, done: int, run: RunDirectory) -> None:
        name = "/".join(run.path.absolute().parts[-2:])
        logger = self.make()
        self.last = logger.begin(LoggedRun(run.path, name, to_dict(config), done)) or 0
        self.logger = logger
        for row in _earlier_rows(run) if done else ():
            if row["step"] <= done:
                self.epoch(row)

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Send the row of an epoch, unless the log has it."""
        step = metrics["step"]
        if self.logger is None or step <= self.last:
            return
        row = numbers(metrics)
        # The step comes last: a log that has it has the whole row.
        self.logger.log(step, {key: row[key] for key in row if key != "step"} | {"step": step})
        self.last = step

    def end(self, results: dict[str, Any] | None = None) -> None:
        logger, self.logger = self.logger, None
        if logger is not None:
            logger.end(results)


def _earlier_rows(run: RunDirectory) -> list[dict[str, Any]]:
    try:
        return run.read_metrics()
    except RunError:  # not written yet, or damaged
        return []
