"""Callbacks that log to TensorBoard and to Weights & Biases.

Neither package is imported unless it is used. A run continues if logging fails.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

from ..errors import ConfigurationError, install_hint
from .callbacks import Callback
from .checkpoint import RunDirectory, write_atomically
from .config import Config, to_dict
from .deprecation import renamed_names

UPLOAD_SECONDS = 120.0  # how long the end of a run waits for the upload to Weights & Biases

__getattr__ = renamed_names(
    __name__,
    {
        "observers": "logging_callbacks",
        "TensorBoardWatch": "TensorBoardCallback",
        "WandbWatch": "WandbCallback",
    },
)


def logging_callbacks(config: Config) -> list[Callback]:
    """Return the callbacks that `config.system` requests.

    Args:
        config: the configuration of the run.

    Raises:
        ConfigurationError: `system.wandb` is set, but wandb is not installed.

    Example:
        >>> from .config import SystemConfig
        >>> logging_callbacks(Config(system=SystemConfig(tensorboard=False)))
        []
    """
    found: list[Callback] = []
    if config.system.tensorboard and find_spec("tensorboard") is not None:
        found.append(TensorBoardCallback())
    if config.system.wandb is not None:
        if find_spec("wandb") is None:
            raise ConfigurationError(
                "system.wandb is set, but wandb is not installed. Remove the setting, or install "
                f"it. {install_hint('logging')}"
            )
        found.append(WandbCallback(config.system.wandb))
    return found


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class TensorBoardCallback(Callback):
    """Writes the numbers of each epoch as scalars into event files in RUN/tensorboard.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run, callback = RunDirectory(folder), TensorBoardCallback()
        ...     callback.begin(Config(), steps=2, done=0, run=run)
        ...     callback.epoch({"epoch": 1, "step": 2, "train_loss": 0.5})
        ...     callback.end()
        ...     len(list((run.path / "tensorboard").glob("events.*")))
        1
    """

    optional = True

    def begin(self, config: Config, steps: int, done: int, run: RunDirectory) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.open = partial(SummaryWriter, run.path / "tensorboard")
        self.writer: Any = None

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Write the scalars of an epoch.

        An interrupted run may have written the first epoch after its checkpoint already.
        TensorBoard discards all scalars from that step on.
        """
        if self.writer is None:
            self.writer = self.open(purge_step=metrics["step"])
        for name, value in _numbers(metrics).items():
            self.writer.add_scalar(name, value, metrics["step"])
        self.writer.flush()  # a run killed in the next epoch does not write this epoch again

    def end(self, results: dict[str, Any] | None = None) -> None:
        if self.writer is not None:
            self.writer.close()


class WandbCallback(Callback):
    """Logs the settings, the numbers of each epoch and the results to Weights & Biases.

    RUN/wandb-id stores the identifier under which a resumed run continues. wandb ignores steps
    that it has already received.

    Args:
        project: the project to log to.

    Example:
        >>> from unittest import mock
        >>> callback = WandbCallback("digits")
        >>> callback.run = mock.Mock()  # `begin` connects to the service
        >>> callback.epoch({"step": 10, "train_loss": 0.5, "test_acc": None})
        >>> callback.run.log.call_args
        call({'step': 10, 'train_loss': 0.5}, step=10, commit=True)
    """

    optional = True

    def __init__(self, project: str) -> None:
        self.project = project

    def begin(self, config: Config, steps: int, done: int, run: RunDirectory) -> None:
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
            reinit="create_new",  # do not end a run that the calling program has started
            settings=wandb.Settings(
                console="off", finish_timeout=UPLOAD_SECONDS, finish_timeout_raises=True
            ),
        )

    def epoch(self, metrics: dict[str, Any]) -> None:
        self.run.log(_numbers(metrics), step=metrics["step"], commit=True)

    def end(self, results: dict[str, Any] | None = None) -> None:
        """Log the results, without the report of the layers, and finish the run."""
        if results is not None:
            self.run.summary.update({k: v for k, v in results.items() if k != "report"})
        self.run.finish(exit_code=1 if results is None else 0)
