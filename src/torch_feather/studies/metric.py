"""The numbers by which studies compare networks: accuracy, or bits per character of a text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..training.evaluation import bits
from .runs import Row


@dataclass(frozen=True, eq=False)
class Metric:
    """A number of a run, with its direction and its words.

    Attributes:
        name: what it is, such as "test accuracy".
        heading: head of a column, and label of an axis.
        points: unit of a difference.
        of: returns it from a row, measured on test data.
        validation: returns it from a row, measured on validation data after the last epoch.
        above: sentence between two methods, if the first is significantly higher.
        below: the same, if it is lower.
        digits: decimals.
        higher_is_better: its direction.

    Example:
        >>> ACCURACY.of({"test_accuracy": 0.5}), BITS.of({"test_loss": 0.0})
        (50.0, 0.0)
    """

    name: str
    heading: str
    points: str
    of: Callable[[Row], float]
    validation: Callable[[Row], float]
    above: str = "is significantly above"
    below: str = "is significantly below"
    digits: int = 2
    higher_is_better: bool = True

    def values(self, rows: Sequence[Row]) -> list[float]:
        """Return the number of each row."""
        return [self.of(row) for row in rows]

    def mean(self, rows: Sequence[Row]) -> float:
        """Return the mean over rows, at least one."""
        return statistics.mean(self.values(rows))

    def signed(self, number: float) -> str:
        """Format a difference with its sign."""
        return f"{number:+.{self.digits}f}".replace("-", "−")


ACCURACY = Metric(
    name="test accuracy",
    heading="test accuracy (%)",
    points="points",
    of=lambda row: 100 * row["test_accuracy"],
    validation=lambda row: 100 * row["curve"]["val_acc"][-1],
)
BITS = Metric(
    name="bits per character",
    heading="bits per character",
    points="bits",
    of=lambda row: bits(row["test_loss"]),
    validation=lambda row: bits(row["curve"]["val_loss"][-1]),
    above="needs significantly more bits per character than",
    below="needs significantly fewer bits per character than",
    digits=3,
    higher_is_better=False,
)


def metric_of(rows: Sequence[Row]) -> Metric:
    """Return bits per character for runs on a text, otherwise accuracy.

    Args:
        rows: the runs.

    Example:
        >>> metric_of([{"config": {"data.name": "text"}}]).name, metric_of([]).name
        ('bits per character', 'test accuracy')
    """
    texts = [row.get("config", {}).get("data.name") == "text" for row in rows]
    return BITS if any(texts) else ACCURACY
