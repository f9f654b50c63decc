"""Training of independent runs, several concurrently, in processes of this machine or Ray tasks.

Finished runs are not trained again, and interrupted runs resume from their checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, FeatherError, install_hint
from ..training import train
from ..training.checkpoint import RunDirectory
from ..training.errors import Interrupted, InUse
from .runs import Row, Run, row_matches, row_of

RETRY_SECONDS = 5.0  # pause before checking again a run that another process trains
RESUME_HINT = "run the same command again to resume"

Submit = Callable[..., "Future[Any]"]
Attempt = tuple[Row | None, str | None]  # row of a finished run, reason for a failed one


@dataclass
class Outcome:
    """Results of a set of runs.

    Attributes:
        rows: name to row of each finished run.
        failed: name to reason of each failed run.
        pending: names of runs that were not started or not completed in the given time.

    Example:
        >>> outcome = Outcome(rows={"a": {"test_accuracy": 0.9}}, failed={"b": "the disk is full"})
        >>> len(outcome.rows), outcome.failed["b"], outcome.pending
        (1, 'the disk is full', [])
    """

    rows: dict[str, Row] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)


def train_all(
    runs: Sequence[Run],
    folder: Path,
    *,
    jobs: int = 1,
    minutes: float | None = None,
    ray: str | None = None,
    known: Iterable[Row] = (),
    on_end: Callable[[str, Outcome], None] = lambda name, outcome: None,
) -> Outcome:
    """Train the runs that are not finished yet.

    Args:
        runs: all runs, in the order in which they start.
        folder: folder of the run directories; with Ray, one that all machines can access.
        jobs: number of concurrent runs; with Ray, number of runs that share a GPU.
        minutes: time after which no new run starts; started runs are completed.
        ray: address of a Ray cluster, `local` to start Ray on this machine, or None for processes.
        known: rows of earlier studies; runs that match one are not trained.
        on_end: called with the name of each run that ended and the outcome so far.

    Returns:
        The outcome, its rows ordered by label as planned.

    Raises:
        ConfigurationError: Ray is not installed or the cluster cannot be reached.
        Interrupted: Ctrl-C; checkpoints of unfinished runs are kept.

    Example:
        >>> from ..training import Config
        >>> run = Run("digits-feather-0.9-0", Config(sparsity=0.9), "feather")
        >>> row = {"name": run.name, "amp": False, "config": {"sparsity": 0.9}, "curve": {}}
        >>> train_all([run], Path("runs"), known=[row]).rows[run.name]["label"]  # trains nothing
        'feather'
    """
    outcome = Outcome(rows=_known_rows(runs, list(known)))
    deadline = None if minutes is None else time.time() + 60 * minutes
    left = [run for run in runs if run.name not in outcome.rows]
    try:
        with _processes(jobs) if ray is None else _ray_tasks(ray, jobs) as submit:
            while left:
                futures = {submit(_attempt, run, folder.absolute(), deadline): run for run in left}
                left = _collect(futures, outcome, on_end)
                if left and deadline is not None and time.time() > deadline:
                    break
                time.sleep(RETRY_SECONDS * bool(left))
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped with {len(outcome.rows)} of {len(runs)} runs finished; {RESUME_HINT}"
        ) from None
    outcome.pending = [run.name for run in left]
    # Order by label as planned, so that a missing run does not change the order of the others.
    order = list(dict.fromkeys(run.label for run in runs))
    finished = [run for run in runs if run.name in outcome.rows]
    finished.sort(key=lambda run: order.index(run.label))
    outcome.rows = {run.name: outcome.rows[run.name] for run in finished}
    return outcome


def _known_rows(runs: Sequence[Run], known: Sequence[Row]) -> dict[str, Row]:
    """Return the rows of earlier studies that match a run, with the labels of these runs."""
    found = {}
    for run in runs:
        if (row := next((row for row in known if row_matches(row, run)), None)) is not None:
            found[run.name] = row | {"label": run.label}
    return found


def _collect(
    futures: dict[Future[Any], Run], outcome: Outcome, on_end: Callable[[str, Outcome], None]
) -> list[Run]:
    """Add the results of all futures to `outcome`; return the runs to try again."""
    left = []
    for future in as_completed(futures):
        run = futures[future]
        row, reason = _result(future)
        if row is not None:
            outcome.rows[run.name] = row
        elif reason is not None:
            outcome.failed[run.name] = reason
        else:
            left.append(run)
            continue
        on_end(run.name, outcome)
    return left


def _result(future: Future[Any]) -> Attempt:
    """Return the row of a run or the reason of its failure; neither if it has to wait."""
    try:
        return future.result()
    except Interrupted:
        raise KeyboardInterrupt from None
    except BrokenProcessPool:
        return None, f"its process was killed (out of memory?); {RESUME_HINT}"


@contextmanager
def _processes(jobs: int) -> Iterator[Submit]:
    """Provide `jobs` processes of this machine; one that dies does not affect the others."""
    own = threading.local()  # each thread's process
    pools: list[ProcessPoolExecutor] = []

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        if not hasattr(own, "pool"):
            spawn = multiprocessing.get_context("spawn")
            own.pool = ProcessPoolExecutor(1, spawn, initializer=_stop_with_parent)
            pools.append(own.pool)
        try:
            return own.pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            del own.pool
            raise

    threads = ThreadPoolExecutor(jobs)
    try:
        yield lambda function, *arguments: threads.submit(call, function, *arguments)
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        for pool in pools:
            pool.shutdown()


def _stop_with_parent() -> None:
    """Save a checkpoint and exit if the study's process is killed, as on Ctrl-C."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        with _training:
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _ray_tasks(address: str, jobs: int) -> Iterator[Submit]:
    """Provide the Ray cluster at `address`, which decides where and when a run is trained.

    A run requests as many CPUs as it has threads and, if the cluster has GPUs, 1/`jobs` of one.
    If its machine is lost, it is started again and resumes from its checkpoint.
    """
    try:
        import ray
    except ImportError:
        raise ConfigurationError(f"--ray requires Ray. {install_hint('ray')}") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address.rpartition(":")[2].isdigit():  # Ray itself would try for minutes
            host, _, port = address.rpartition("://")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, include_dashboard=False if address == "local" else None)
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConfigurationError(
            f"--ray {address}: no cluster answers at this address ({first})"
        ) from None
    gpu = 1 / jobs if ray.cluster_resources().get("GPU") else 0

    def submit(function: Callable[..., Any], run: Run, *arguments: Any) -> Future[Any]:
        threads = run.config.system.threads or 1
        task = ray.remote(num_cpus=threads, num_gpus=gpu)(function)
        return task.remote(run, *arguments).future()

    try:
        yield submit
    finally:
        ray.shutdown()


_training = threading.Lock()  # held while this process trains
_stopped = False  # whether this process was interrupted; it may get another run before it exits


def _attempt(run: Run, folder: Path, deadline: float | None) -> Attempt:
    """Train a run; return its row or the reason of its failure.

    Returns neither if the deadline has passed or another process trains the run.
    """
    global _stopped
    if _stopped:
        raise Interrupted(f"{run.name}: not started")
    try:
        with _training:
            return _train(run, RunDirectory(folder / run.name), deadline), None
    except Interrupted:
        _stopped = True
        raise
    except InUse:
        return None, None
    except FeatherError as error:
        return None, str(error)
    except Exception as error:
        # Any other error: keep the results of the other runs.
        first = (str(error).splitlines() or [""])[0]
        return None, f"{type(error).__name__}: {first}"


def _train(run: Run, directory: RunDirectory, deadline: float | None) -> Row | None:
    if directory.report_file.exists():
        directory.begin(run.config, resume=True)  # checks that the settings are the same
    elif deadline is not None and time.time() > deadline:
        return None
    else:
        train(run.config, directory.path, resume=True)
    return row_of(run, directory)
