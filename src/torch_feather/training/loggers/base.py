"""The interface of loggers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LoggedRun:
    """The run that a logger is opened for.

    Attributes:
        folder: the run directory. Files that a logger needs in order to resume belong there.
        name: the last two parts of its path.
        config: all settings, as nested plain values.
        step: optimizer steps that were taken before; 0 unless the run is resumed. Rows of later
            steps, which a killed process may have logged, are sent again.

    Example:
        >>> LoggedRun(Path("runs/a"), "runs/a", {"epochs": 2}, step=0).config["epochs"]
        2
    """

    folder: Path
    name: str
    config: dict[str, Any]
    step: int


class Logger:
    """Base class of loggers: one object for each run, closed by `end`.

    A logger may fail: the training run continues without it, with one warning.

    Example:
        >>> class Print(Logger):
        ...     def log(self, step, metrics):
        ...         print(step, metrics["train_loss"])
        >>> logger = Print()
        >>> logger.begin(LoggedRun(Path("runs/a"), "runs/a", {}, step=0))
        0
        >>> logger.log(10, {"train_loss": 0.5})
        10 0.5
        >>> logger.end(None)
    """

    def begin(self, run: LoggedRun) -> int:
        """Open the log of a run, or continue it.

        Args:
            run: the run.

        Returns:
            The last step whose row the log already has; 0 for an empty log. The rows of later
            steps follow, those of earlier epochs included.
        """
        return 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write a row: the numbers of an epoch.

        Args:
            step: optimizer steps so far.
            metrics: numbers by name, as in metrics.jsonl; those that were not measured are left
                out. The last one is `step`.
        """

    def end(self, results: dict[str, Any] | None) -> None:
        """Close the log.

        Args:
            results: the content of report.json; None if the run did not finish.
        """


def numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers among nested values, by dotted name.

    Args:
        values: values and mappings of them, by name. Booleans, texts and lists are left out.
        prefix: start of all names.

    Example:
        >>> numbers({"test_accuracy": 0.5, "macs": {"sparse": 8}, "method": "feather"})
        {'test_accuracy': 0.5, 'macs.sparse': 8}
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found
