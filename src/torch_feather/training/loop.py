"""A training run: a network trained into a run directory."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from .checkpoint import RunDirectory, write_json
from .config import Config, SystemConfig
from .data import load_dataset
from .distributed import Ranks, joined
from .errors import RunError
from .task import Task
from .watch import Watch


def train(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    watch: Watch | None = None,
    make_task: Callable[..., Task] = Task,
) -> dict[str, Any]:
    """Train one network into the run directory `out`; returns what report.json holds.

    With `resume`, a run that was killed goes on from its last checkpoint and ends with the same
    bits; one that has finished is only read. With `config.compare_dense` the dense network is
    trained with the same budget into `out`/dense. Started by `torchrun`, all processes train one
    network; the first one alone writes files and calls `watch`. `make_task` stands in for `Task`,
    for a run that differs in one of its methods.

    Raises:
        FeatherError: settings, data or files that cannot be used; a loss that is not finite.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    with joined() as ranks:
        watch = watch if watch is not None and ranks.first else Watch()
        run = RunDirectory(out)
        results = _train_one(config, run, resume, watch, make_task, ranks)
        if config.compare_dense and "dense" not in results:
            twin = run.dense_twin()
            dense = _train_one(config.dense(), twin, True, watch, make_task, ranks)
            keys = ("test_accuracy", "test_loss", "macs", "seconds")
            results["dense"] = {key: dense[key] for key in keys}
            if ranks.first:
                with run.locked():
                    write_json(run.report_file, results)
        if ranks.first:
            _draw(run, results, watch)
    return results


def _train_one(
    config: Config,
    run: RunDirectory,
    resume: bool,
    watch: Watch,
    make_task: Callable[..., Task],
    ranks: Ranks,
) -> dict[str, Any]:
    with ExitStack() as held, settings(config.system, ranks) as device:

        def begin() -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
            held.enter_context(run.locked())
            saved = run.begin(config, resume, watch.message)
            return saved, run.read_report() if run.report_file.exists() else None

        saved, results = ranks.on_first(begin)
        if results is not None:
            return results
        data = ranks.one_after_another(lambda: load_dataset(config.data, config.seed))
        # A checkpoint has all that followed from the weights that the run began with.
        begun = config if saved is None else replace(config, init=None)
        task = make_task(begun, data, device, ranks)
        ranks.on_first(lambda: run.write_config(config))
        if saved is not None:
            task.load_state_dict(saved)
            watch.message(f"resuming {run.path} at step {task.step} of {task.total_steps}")
        watch.begin(config, task.total_steps, task.step, run)
        try:
            with _stop_requests() as stop_requested:
                task.fit(run, watch, stop_requested)
            results = task.finish(run)
        finally:
            watch.end(results)
        return results


@contextmanager
def settings(system: SystemConfig, ranks: Ranks) -> Iterator[torch.device]:
    """PyTorch's global switches as a run wants them, put back afterwards; and its device."""
    cudnn, memory = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        memory.fill_uninitialized_memory,
    )
    if system.threads is not None:
        torch.set_num_threads(system.threads)
    if system.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(system.deterministic, warn_only=True)
    cudnn.deterministic, cudnn.benchmark = system.deterministic, not system.deterministic
    # Else every tensor is written twice, in hundreds of calls a step; nothing reads it unwritten.
    memory.fill_uninitialized_memory = False
    try:
        device = resolve_device(system.device, ranks)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield device
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory = before[3:]


def resolve_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """`auto` is cuda where there is one, else cpu. `RunError` for one that does not exist.

    Of several ranks on a machine, each has a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks is not None and ranks.count > 1:
        name = f"cuda:{ranks.local}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise RunError(f"device {name!r} cannot be used here ({first})") from None
    return device


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a request that the loop answers between two steps.

    An exception in the middle of a step would leave a state that no run without it passes
    through. A second Ctrl-C interrupts at once.
    """
    requested = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def request(number: int, frame: object) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    previous = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _draw(run: RunDirectory, results: dict[str, Any], watch: Watch) -> None:
    try:
        from ..analysis.plots import draw_run
    except ImportError as error:
        watch.message(f"no plots: {error.name} is missing (pip install 'torch-feather[train]')")
        return
    draw_run(run.path, run.read_metrics(), results)
