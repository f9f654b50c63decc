"""Rows as scalars of TensorBoard."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from .base import LoggedRun, Logger


class TensorBoardLogger(Logger):
    """Writes event files into RUN/tensorboard.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> logger = TensorBoardLogger()
        >>> logger.begin(LoggedRun(folder, "runs/a", {}, step=0))
        0
        >>> logger.log(10, {"train_loss": 0.5, "step": 10})
        >>> logger.end(None)
        >>> logger.begin(LoggedRun(folder, "runs/a", {}, step=15))
        10
    """

    def begin(self, run: LoggedRun) -> int:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = run.folder / "tensorboard"
        self.open = partial(SummaryWriter, self.folder)
        self.writer: Any = None
        return _last_step(self.folder, run.step) if run.step else 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the scalars of a row.

        A killed process may have written this row, or a part of it. TensorBoard discards all
        scalars from this step on.
        """
        if self.writer is None:
            _wait_for_next_second(self.folder)
            self.writer = self.open(purge_step=step)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def end(self, results: dict[str, Any] | None) -> None:
        if self.writer is not None:
            self.writer.close()


def _wait_for_next_second(folder: Path) -> None:
    """Wait until a new event file comes after those that are there.

    TensorBoard reads the files in the order of their names. These begin with the second; within a
    second, the number of the process decides.
    """
    seconds = [file.name.split(".")[3] for file in folder.glob("events.out.tfevents.*")]
    last = max((int(text) for text in seconds if text.isdigit()), default=0)
    while int(time.time()) == last:
        time.sleep(0.05)


def _last_step(folder: Path, done: int) -> int:
    """Return the last step, up to `done`, whose row TensorBoard shows."""
    if not folder.is_dir():
        return 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if "step" not in events.Tags()["scalars"]:
        return 0
    return max((one.step for one in events.Scalars("step") if one.step <= done), default=0)
