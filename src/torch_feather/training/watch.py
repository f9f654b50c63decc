"""What a run tells those who look on."""

from __future__ import annotations

from typing import Any

from .checkpoint import RunDirectory
from .config import Config


class Watch:
    """What a run tells its observer; this one is not interested."""

    def message(self, text: str) -> None:
        """Something worth a line."""

    def begin(self, config: Config, steps: int, done: int, run: RunDirectory) -> None:
        """Training starts at step `done` of `steps`, each epoch has steps // epochs of them."""

    def step(self, images: int) -> None:
        """One optimizer step on that many images was taken. Must cost next to nothing."""

    def epoch(self, metrics: dict[str, Any]) -> None:
        """An epoch ended; `metrics` is its line in metrics.jsonl."""

    def end(self, results: dict[str, Any] | None = None) -> None:
        """The steps are over; `results`, what report.json holds, if the run was completed."""
