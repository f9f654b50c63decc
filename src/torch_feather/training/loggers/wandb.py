"""Rows of a run of Weights & Biases."""

from __future__ import annotations

import os
from typing import Any
from uuid import uuid4

from ..writing import write_atomically
from .base import LoggedRun, Logger

CONNECT_SECONDS = 30.0  # how long the start of a run waits for the service
UPLOAD_SECONDS = 120.0  # how long the end of a run waits for the upload


class WandbLogger(Logger):
    """Logs settings, rows and results to a project of Weights & Biases.

    RUN/wandb-id holds the identifier under which a resumed run continues. The service says which
    rows it has. Without it (`WANDB_MODE=offline`), a resumed run writes all rows again, so that
    RUN/wandb/latest-run is complete: a killed process may not have written its last rows.

    Args:
        project: the project.

    Example:
        >>> from unittest import mock
        >>> logger = WandbLogger("digits")
        >>> logger.run = mock.Mock()  # `begin` connects to the service
        >>> logger.log(10, {"train_loss": 0.5, "step": 10})
        >>> logger.run.log.call_args
        call({'train_loss': 0.5, 'step': 10}, step=10, commit=True)
    """

    def __init__(self, project: str) -> None:
        self.project = project

    def begin(self, run: LoggedRun) -> int:
        import wandb

        id_file = run.folder / "wandb-id"
        if not id_file.exists():
            write_atomically(id_file, lambda file: file.write(uuid4().hex[:16].encode()))
        self.run = wandb.init(
            project=self.project,
            id=id_file.read_text(),
            resume="allow",
            name=run.name,
            config=run.config,
            dir=run.folder,
            reinit="create_new",  # do not end a run that the calling program has started
            settings=wandb.Settings(
                console="off",
                init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", CONNECT_SECONDS)),
                finish_timeout=UPLOAD_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        return self.run.starting_step - 1 if self.run.resumed else 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step, commit=True)

    def end(self, results: dict[str, Any] | None) -> None:
        """Log the results, without the report of the layers, and finish the run."""
        if results is not None:
            self.run.summary.update({k: v for k, v in results.items() if k != "report"})
        self.run.finish(exit_code=1 if results is None else 0)
