"""A logger of your own for `feather train`, here a table in a SQLite database.

    feather train --system.loggers '[own_logger:Database]'

The command finds this file in the current folder or on PYTHONPATH. It creates one object for each
run, without arguments. If a method fails, the training run continues without the logger.
"""

import sqlite3
from typing import Any

from torch_feather.training import LoggedRun, Logger


class Database(Logger):
    """Writes the rows of a run to RUN/metrics.sqlite."""

    def begin(self, run: LoggedRun) -> int:
        """Open the database, and return the last step that it has."""
        self.database = sqlite3.connect(run.folder / "metrics.sqlite")
        with self.database:  # a transaction: a killed process leaves no part of a row
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS metrics (step, name, value, PRIMARY KEY (step, name))"
            )
            # A killed process may have logged steps that are trained again.
            self.database.execute("DELETE FROM metrics WHERE step > ?", (run.step,))
        (last,) = self.database.execute("SELECT max(step) FROM metrics").fetchone()
        return last or 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Insert the row of an epoch."""
        rows = [(step, name, value) for name, value in metrics.items()]
        with self.database:
            self.database.executemany("INSERT INTO metrics VALUES (?, ?, ?)", rows)

    def end(self, results: dict[str, Any] | None) -> None:
        """Close the database."""
        self.database.close()
