"""Observers that are services of others: TensorBoard, and Weights & Biases.

Neither is imported before it is needed, and a run goes on without one that fails.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

from ..errors import ConfigurationError
from .checkpoint import RunDirectory, write_atomically
from .config import Config, to_dict
from .watch import Watch

UPLOAD_SECONDS = 120.0  # how long the end of a run waits for Weights & Biases


def observers(config: Config) -> list[Watch]:
    """Those that `config.system` asks for.

    Raises:
        ConfigurationError: `system.wandb` is set, and wandb is not installed.
    """
    found: list[Watch] = []
    if config.system.tensorboard and find_spec("tensorboard") is not None:
        found.append(TensorBoardWatch())
    if config.system.wandb is not None:
        if find_spec("wandb") is None:
            raise ConfigurationError(
                "system.wandb: wandb is not installed; pip install 'torch-feather[logging]', "
                "or leave the setting out"
            )
        found.append(WandbWatch(config.system.wandb))
    return found


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class TensorBoardWatch(Watch):
    """Every number of an epoch as a scalar over steps, in event files under RUN/tensorboard."""

    dispensable = True

    def begin(self, config: Config, steps: int, done: int, run: RunDirectory) -> None:
        """Remember where to write."""
        from torch.utils.tensorboard import SummaryWriter

        self.open = partial(SummaryWriter, run.path / "tensorboard")
        self.writer: Any = None

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Write the epoch's scalars.

        The first epoch of a resumed run may have been written before the run was stopped:
        TensorBoard then drops what it has from that step on.
        """
        if self.writer is None:
            self.writer = self.open(purge_step=metrics["step"])
        for name, value in _numbers(metrics).items():
            self.writer.add_scalar(name, value, metrics["step"])
        self.writer.flush()  # a run that is killed in the next epoch does not write this one again

    def end(self, results: dict[str, Any] | None = None) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()


class WandbWatch(Watch):
    """Settings, the numbers of every epoch and the results, in a project of Weights & Biases.

    RUN/wandb-id keeps the identity under which a resumed run goes on. wandb itself ignores a step
    that is not beyond those it has.
    """

    dispensable = True

    def __init__(self, project: str) -> None:
        self.project = project

    def begin(self, config: Config, steps: int, done: int, run: RunDirectory) -> None:
        """Start the run there, or go on with it."""
        import wandb

        id_file = run.path / "wandb-id"
        if not id_file.exists():
            write_atomically(id_file, lambda file: file.write(uuid4().hex[:16].encode()))
        self.run = wandb.init(
            project=self.project,
            id=id_file.read_text(),
            resume="allow",
            name="/".join(run.path.absolute().parts[-2:]),
            config=to_dict(config),
            dir=run.path,
            reinit="create_new",  # a run of the calling program stays what it is
            settings=wandb.Settings(
                console="off", finish_timeout=UPLOAD_SECONDS, finish_timeout_raises=True
            ),
        )

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Log the epoch's numbers at its step."""
        self.run.log(_numbers(metrics), step=metrics["step"], commit=True)

    def end(self, results: dict[str, Any] | None = None) -> None:
        """Put the results into the summary, the report of the layers aside, and finish."""
        if results is not None:
            self.run.summary.update({k: v for k, v in results.items() if k != "report"})
        self.run.finish(exit_code=1 if results is None else 0)
