"""Rows as a CSV file."""

from __future__ import annotations

import csv
import io

from ..writing import write_atomically
from .base import LoggedRun, Logger


class CSVLogger(Logger):
    """Writes RUN/metrics.csv: one line per epoch, empty cells for what was not measured.

    The file is replaced as a whole, so that it is complete whenever it is read. A resumed run
    writes it again from metrics.jsonl.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> logger = CSVLogger()
        >>> logger.begin(LoggedRun(folder, "runs/a", {}, step=0))
        0
        >>> logger.log(10, {"train_loss": 0.5, "step": 10})
        >>> logger.log(20, {"train_loss": 0.25, "val_acc": 0.75, "step": 20})
        >>> print((folder / "metrics.csv").read_text())
        step,train_loss,val_acc
        10,0.5,
        20,0.25,0.75
        <BLANKLINE>
    """

    def begin(self, run: LoggedRun) -> int:
        self.path = run.folder / "metrics.csv"
        self.rows: list[dict[str, float]] = []
        return 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)
        names = dict.fromkeys(["step", *(name for row in self.rows for name in row)])
        text = io.StringIO()
        writer = csv.DictWriter(text, list(names), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))
