"""Rows as metrics of MLflow."""

from __future__ import annotations

import os
import time
from typing import Any

from ..config import flatten
from ..writing import write_atomically
from .base import LoggedRun, Logger, numbers

MOST_PARAMETERS = 100  # in one request, a limit of MLflow
LONGEST_VALUE = 500  # characters of a parameter, a limit of some stores
RETRIES = "2"  # of a request; MLflow's default of 7 would block for minutes without a server


class MLflowLogger(Logger):
    """Logs settings, rows and results to an experiment of MLflow.

    MLflow's own settings, such as MLFLOW_TRACKING_URI, name the server or folder. RUN/mlflow-id
    holds the identifier under which a resumed run continues. Metrics that MLflow has are not sent
    again.

    Args:
        experiment: name of the experiment; created if it does not exist.

    Example:
        >>> MLflowLogger("digits").experiment
        'digits'
    """

    def __init__(self, experiment: str) -> None:
        self.experiment = experiment

    def begin(self, run: LoggedRun) -> int:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", RETRIES)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client: Any = MlflowClient()
        self.id = self._continue(run) if run.step else None
        if self.id is None:
            made = self.client.create_run(self._experiment_id(), run_name=run.name)
            self.id = made.info.run_id
            content = self.id.encode()
            write_atomically(run.folder / "mlflow-id", lambda file: file.write(content))
        data = self.client.get_run(self.id).data
        parameters = [
            Param(key, str(value)[:LONGEST_VALUE])
            for key, value in flatten(run.config).items()
            if key not in data.params
        ]
        for start in range(0, len(parameters), MOST_PARAMETERS):
            self.client.log_batch(self.id, params=parameters[start : start + MOST_PARAMETERS])
        # A killed process may have logged a part of a row.
        self.last = {
            key: max(one.step for one in self.client.get_metric_history(self.id, key))
            for key in data.metrics
        }
        return min(self.last.get("step", 0), run.step)

    def _continue(self, run: LoggedRun) -> str | None:
        """Return the identifier of the run that MLflow has; None if there is none."""
        from mlflow.exceptions import MlflowException

        id_file = run.folder / "mlflow-id"
        if not id_file.exists():
            return None
        name = id_file.read_text()
        try:
            found = self.client.get_run(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if found.info.lifecycle_stage != "active":  # deleted
            return None
        self.client.update_run(name, status="RUNNING")
        return name

    def _experiment_id(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        return found.experiment_id if found else self.client.create_experiment(self.experiment)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._log(step, {k: v for k, v in metrics.items() if step > self.last.get(k, -1)})

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        found = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self.client.log_batch(self.id, metrics=found)

    def end(self, results: dict[str, Any] | None) -> None:
        """Log the results, without the report of the layers, and end the run."""
        if results is not None:
            final = numbers({k: v for k, v in results.items() if k != "report"}, "results/")
            self._log(results["epochs"], final)
        self.client.set_terminated(self.id, "KILLED" if results is None else "FINISHED")
