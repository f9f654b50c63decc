"""What a run tells those who look on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import warn
from .checkpoint import RunDirectory
from .config import Config


class Watch:
    """What a run tells its observer; this one is not interested."""

    dispensable = False  # whether `Watches` lets training go on when this observer fails

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


class Watches(Watch):
    """Tells several observers, of the end in reverse order.

    A dispensable one that fails is left out, with one warning.
    """

    def __init__(self, watches: Iterable[Watch]) -> None:
        self.watches = list(watches)

    def message(self, text: str) -> None:
        """To all."""
        self._tell("message", text)

    def begin(self, config: Config, steps: int, done: int, run: RunDirectory) -> None:
        """To all."""
        self._tell("begin", config, steps, done, run)

    def step(self, images: int) -> None:
        """To all."""
        self._tell("step", images)

    def epoch(self, metrics: dict[str, Any]) -> None:
        """To all."""
        self._tell("epoch", metrics)

    def end(self, results: dict[str, Any] | None = None) -> None:
        """To all, those first that began last."""
        self._tell("end", results)

    def _tell(self, event: str, *details: Any) -> None:
        for watch in self.watches if event != "end" else reversed(self.watches):
            try:
                getattr(watch, event)(*details)
            except Exception as error:
                if not watch.dispensable:
                    raise
                self.watches = [other for other in self.watches if other is not watch]
                reason = (str(error).splitlines() or [""])[0]
                warn(
                    f"{type(watch).__name__} failed and is left out from now on "
                    f"({type(error).__name__}: {reason}); the training goes on"
                )
