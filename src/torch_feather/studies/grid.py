"""Independent training runs, several at a time, each in a process of its own.

A run that is done is not trained again, one that was stopped or killed goes on where it was, so a
grid can be started as often as one likes.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FeatherError
from ..training import Config, train
from ..training.checkpoint import RunDirectory
from ..training.config import DENSE
from ..training.errors import Interrupted

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A training, and the name of its folder among the grid's."""

    name: str
    config: Config


@dataclass
class Outcome:
    """What became of the runs: a row for each that is done, a reason for each that failed."""

    rows: dict[str, Row]
    failed: dict[str, str]
    waiting: list[str]  # not started, for lack of time


def train_all(
    runs: Sequence[Run],
    folder: Path,
    *,
    jobs: int = 1,
    minutes: float | None = None,
    done: Callable[[str, Outcome], None] = lambda name, outcome: None,
) -> Outcome:
    """Train what is missing of `runs` into `folder`.

    Args:
        runs: in the order in which they start.
        folder: of the run directories.
        jobs: trainings at a time.
        minutes: after which none is started any more; those that run are completed.
        done: told of each run that ended, and of all so far.

    Raises:
        Interrupted: Ctrl-C; the trainings have written checkpoints.
    """
    outcome = Outcome({}, {}, [])
    deadline = None if minutes is None else time.time() + 60 * minutes
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(_train, run, folder, deadline): run.name for run in runs}
        for future in as_completed(futures):
            name = futures[future]
            try:
                row = future.result()
            except Interrupted:
                raise KeyboardInterrupt from None
            except FeatherError as error:
                outcome.failed[name] = str(error)
            else:
                if row is None:
                    outcome.waiting.append(name)
                    continue
                outcome.rows[name] = row
            done(name, outcome)
    except KeyboardInterrupt:
        pool.shutdown(wait=True, cancel_futures=True)
        raise Interrupted(
            f"stopped with {len(outcome.rows)} of {len(runs)} runs done; the same command goes on"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    order = {run.name: i for i, run in enumerate(runs)}
    outcome.rows = dict(sorted(outcome.rows.items(), key=lambda item: order[item[0]]))
    return outcome


def _train(run: Run, folder: Path, deadline: float | None) -> Row | None:
    directory = RunDirectory(folder / run.name)
    if directory.report_file.exists():
        directory.begin(run.config, resume=True)  # is it this run?
        return row_of(directory.read_report(), directory.read_metrics())
    if deadline is not None and time.time() > deadline:
        return None
    return row_of(train(run.config, directory.path, resume=True), directory.read_metrics())


def row_of(results: Row, metrics: Sequence[Row]) -> Row:
    """What a study keeps of a run: small, and enough to believe it later."""
    report = results["report"]
    curve = ("epoch", "train_loss", "val_acc", "test_acc", "sparsity")
    return {
        **{key: results[key] for key in ("network", "data", "method", "seed", "epochs")},
        "sparsity": 0.0 if results["method"] == DENSE else results["target_sparsity"],
        "own_sparsity": results.get("own_sparsity"),
        **{key: results[key] for key in ("test_accuracy", "test_loss", "train_loss")},
        "weights": report["weights"],
        "zeros": report["zeros"],
        "macs": results["macs"]["sparse"],
        "seconds": round(results["seconds"], 1),
        "curve": {key: [line.get(key) for line in metrics] for key in curve},
        **{key: results[key] for key in ("commit", "versions", "hardware")},
    }
