"""Independent training runs, several at a time: processes of this machine, or tasks of Ray.

A run that is done is not trained again, one that was stopped or killed goes on where it was, so a
grid can be started as often as one likes.
"""

from __future__ import annotations

import math
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.stability import correlations, read_masks
from ..errors import ConfigurationError, FeatherError
from ..training import Config, train
from ..training.checkpoint import RunDirectory, changed_keys
from ..training.config import DENSE, apply, flatten, to_dict
from ..training.errors import Interrupted, InUse, RunError

Row = dict[str, Any]
BUSY = 5.0  # seconds until a run that another process trains is looked at again
Submit = Callable[..., "Future[Any]"]


@dataclass(frozen=True)
class Run:
    """A training, the name of its folder among the grid's, and what it is called in the answer."""

    name: str
    config: Config
    label: str


@dataclass
class Outcome:
    """What became of the runs: a row for each that is done, a reason for each that failed."""

    rows: dict[str, Row]
    failed: dict[str, str]
    waiting: list[str]  # not done for lack of time


def train_all(
    runs: Sequence[Run],
    folder: Path,
    *,
    jobs: int = 1,
    minutes: float | None = None,
    ray: str | None = None,
    known: Iterable[Row] = (),
    done: Callable[[str, Outcome], None] = lambda name, outcome: None,
) -> Outcome:
    """Train what is missing of `runs` into `folder`.

    Args:
        runs: in the order in which they start.
        folder: of the run directories; with Ray, one that all machines see.
        jobs: trainings at a time; with Ray, those that share a GPU.
        minutes: after which none is started any more; those that run are completed.
        ray: address of a Ray cluster, `local` for one that is started here; None: this machine.
        known: rows of earlier studies, whose runs are done wherever they were trained.
        done: told of each run that ended, and of all so far.

    Raises:
        ConfigurationError: Ray is not installed, or cannot be reached.
        Interrupted: Ctrl-C; what was trained so far is kept as checkpoints.
    """
    known = list(known)
    outcome = Outcome({}, {}, [])
    for run in runs:
        if (row := next((row for row in known if stands_for(row, run)), None)) is not None:
            outcome.rows[run.name] = row | {"label": run.label}
    deadline = None if minutes is None else time.time() + 60 * minutes
    left = [run for run in runs if run.name not in outcome.rows]
    try:
        with processes(jobs) if ray is None else ray_tasks(ray, jobs) as submit:
            while left:
                futures = {submit(_attempt, run, folder.absolute(), deadline): run for run in left}
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
                    done(run.name, outcome)
                if left and deadline is not None and time.time() > deadline:
                    break
                time.sleep(BUSY * bool(left))
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped with {len(outcome.rows)} of {len(runs)} runs done; the same command goes on"
        ) from None
    outcome.waiting = [run.name for run in left]
    # By what they are called, as planned: a run that is missing moves no other's place.
    order = list(dict.fromkeys(run.label for run in runs))
    done_in_order = [run for run in runs if run.name in outcome.rows]
    done_in_order.sort(key=lambda run: order.index(run.label))
    outcome.rows = {run.name: outcome.rows[run.name] for run in done_in_order}
    return outcome


def _result(future: Future[Any]) -> tuple[Row | None, str | None]:
    """The run's row, or why it failed; neither if it has to wait."""
    try:
        return future.result()
    except Interrupted:
        raise KeyboardInterrupt from None
    except BrokenProcessPool:
        return None, "its process was killed (is there enough memory?); the same command goes on"


@contextmanager
def processes(jobs: int) -> Iterator[Submit]:
    """That many processes of this machine. One that dies takes no other training with it."""
    own = threading.local()  # each thread's process
    pools: list[ProcessPoolExecutor] = []

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        if not hasattr(own, "pool"):
            spawn = multiprocessing.get_context("spawn")
            own.pool = ProcessPoolExecutor(1, spawn, initializer=_end_with_parent)
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


def _end_with_parent() -> None:
    """The process of a study that was killed writes a checkpoint and ends, as on Ctrl-C."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        with _training:
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def ray_tasks(address: str, jobs: int) -> Iterator[Submit]:
    """Ray's cluster at `address`: where and when a training runs is Ray's business.

    A training asks for as many CPUs as it has threads, and, where the cluster has GPUs, for its
    share of one. One whose machine is lost is started again, and goes on from its checkpoint.
    """
    try:
        import ray
    except ImportError:
        raise ConfigurationError("--ray needs Ray: pip install 'torch-feather[ray]'") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address.rpartition(":")[2].isdigit():  # Ray itself would try for minutes
            host, _, port = address.rpartition("://")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, include_dashboard=False if address == "local" else None)
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ConfigurationError(f"--ray {address}: no cluster answers there ({first})") from None
    share = 1 / jobs if ray.cluster_resources().get("GPU") else 0

    def submit(function: Callable[..., Any], run: Run, *arguments: Any) -> Future[Any]:
        threads = run.config.system.threads or 1
        task = ray.remote(num_cpus=threads, num_gpus=share)(function)
        return task.remote(run, *arguments).future()

    try:
        yield submit
    finally:
        ray.shutdown()


_training = threading.Lock()  # held while this process trains
_stopped = False  # whether it was interrupted: it may be handed another run before it ends


def _attempt(run: Run, folder: Path, deadline: float | None) -> tuple[Row | None, str | None]:
    """The run's row, or why it failed; neither if it is too late, or another process trains it."""
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
        # Whatever it is, the other trainings are worth something without this one.
        first = (str(error).splitlines() or [""])[0]
        return None, f"{type(error).__name__}: {first}"


def _train(run: Run, directory: RunDirectory, deadline: float | None) -> Row | None:
    if directory.report_file.exists():
        directory.begin(run.config, resume=True)  # is it this run?
    elif deadline is not None and time.time() > deadline:
        return None
    else:
        train(run.config, directory.path, resume=True)
    return row_of(run, directory)


def stands_for(row: Row, run: Run) -> bool:
    """Whether a row is what training a run would give: by all settings, and masks if wanted."""
    if row["name"] != run.name or row["amp"] != run.config.system.amp:
        return False
    masks = run.config.track_masks and run.config.method != DENSE
    if masks and "mask_correlation" not in row["curve"]:
        return False
    try:
        old = apply(Config(), row["config"], row["name"])
    except ConfigurationError:  # settings that there are no more
        return False
    return not changed_keys(old, run.config.written_out())


def _settings(config: Config) -> dict[str, Any]:
    """All that decides what a run computes; not where, nor how fast."""
    settings = flatten(to_dict(config.written_out()))
    aside = ("data.path", "compare_dense", "track_masks")
    return {
        key: value
        for key, value in settings.items()
        if not key.startswith("system.") and key not in aside
    }


def row_of(run: Run, directory: RunDirectory) -> Row:
    """What a study keeps of a finished run: small, and enough to believe it later.

    Raises:
        RunError: it should have recorded its masks, and some are missing.
    """
    results, metrics = directory.read_report(), directory.read_metrics()
    report = results["report"]
    keys = ("epoch", "train_loss", "val_acc", "test_acc", "sparsity")
    curve = {key: [line.get(key) for line in metrics] for key in keys}
    masks = read_masks(directory.path, results["epochs"])
    if masks is not None:
        found = correlations(masks, report["weights"])
        curve["mask_correlation"] = [None if math.isnan(r) else r for r in found]
    elif run.config.track_masks and run.config.method != DENSE:
        raise RunError(
            f"{directory.path}: was trained without --track-masks, at least in part; remove it to "
            "have it trained again, or choose another --runs"
        )
    return {
        "name": run.name,
        "label": run.label,
        "data": run.config.data.title,
        "amp": run.config.system.amp,
        "select": run.config.select,
        "config": _settings(run.config),
        **{key: results[key] for key in ("network", "method", "seed", "epochs")},
        "sparsity": 0.0 if results["method"] == DENSE else results["target_sparsity"],
        "own_sparsity": results.get("learned_sparsity", results.get("own_sparsity")),
        **{key: results[key] for key in ("test_accuracy", "test_loss", "train_loss")},
        "weights": report["weights"],
        "zeros": report["zeros"],
        "macs": results["macs"]["sparse"],
        "dense_macs": results["macs"]["dense"],
        "seconds": round(results["seconds"], 1),
        "curve": curve,
        **{key: results[key] for key in ("commit", "versions", "hardware")},
    }
