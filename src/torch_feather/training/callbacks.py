"""Callbacks: objects that a training run informs about its progress."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..deprecation import warn_renamed
from ..errors import warn
from .checkpoint import RunDirectory
from .config import Config


class Callback:
    """Base class of callbacks. Its methods do nothing; override those of interest.

    Attributes:
        optional: whether `Callbacks` continues without this callback after it failed.

    Example:
        >>> class Count(Callback):
        ...     steps = 0
        ...     def step(self, images):
        ...         self.steps += 1
        >>> count = Count()
        >>> count.step(images=128)
        >>> count.steps
        1
    """

    optional = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "dispensable" in cls.__dict__:
            warn_renamed(f"{cls.__name__}.dispensable", f"{cls.__name__}.optional")
            cls.optional = cls.__dict__["dispensable"]

    def message(self, text: str) -> None:
        """Receive a message for the user, one line."""

    def begin(self, config: Config, steps: int, done: int, run: RunDirectory) -> None:
        """Prepare for a run.

        Args:
            config: its configuration.
            steps: optimizer steps of the whole run; each epoch has `steps // config.epochs`.
            done: steps that were taken before; 0 unless the run is resumed.
            run: its directory.
        """

    def step(self, images: int) -> None:
        """Receive the number of images of an optimizer step. Called after each step: be fast."""

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Receive the metrics of an epoch, as in metrics.jsonl."""

    def end(self, results: dict[str, Any] | None = None) -> None:
        """Clean up after a run.

        Args:
            results: the content of report.json; None if the run did not finish.
        """


class Callbacks(Callback):
    """Several callbacks as one. They end in reverse order.

    An optional callback that fails is removed, with one warning.

    Args:
        callbacks: called in this order.

    Example:
        >>> class Loud(Callback):
        ...     def message(self, text):
        ...         print(text.upper())
        >>> class Plain(Callback):
        ...     def message(self, text):
        ...         print(text)
        >>> Callbacks([Loud(), Plain()]).message("resuming")
        RESUMING
        resuming
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = list(callbacks)

    def message(self, text: str) -> None:
        self._call("message", text)

    def begin(self, config: Config, steps: int, done: int, run: RunDirectory) -> None:
        self._call("begin", config, steps, done, run)

    def step(self, images: int) -> None:
        self._call("step", images)

    def epoch(self, metrics: dict[str, Any]) -> None:
        self._call("epoch", metrics)

    def end(self, results: dict[str, Any] | None = None) -> None:
        self._call("end", results)

    def _call(self, event: str, *details: Any) -> None:
        for callback in self.callbacks if event != "end" else reversed(self.callbacks):
            try:
                getattr(callback, event)(*details)
            except Exception as error:
                if not callback.optional:
                    raise
                self.callbacks = [other for other in self.callbacks if other is not callback]
                reason = (str(error).splitlines() or [""])[0]
                name = getattr(callback, "name", type(callback).__name__)
                warn(
                    f"{name} failed ({type(error).__name__}: {reason}). "
                    "Training continues without it."
                )
