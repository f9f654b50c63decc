"""Training runs: from a configuration to a run directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ..deprecation import renamed_argument
from ..errors import install_hint
from .automatic import choose_settings, with_class_names
from .callbacks import Callback
from .checkpoint import RunDirectory, write_json
from .checkpoint_files import newest, set_aside
from .config import AUTO, Config, SystemConfig
from .data import load_dataset
from .distributed import Ranks, process_group
from .errors import DamagedCheckpoint, RunError
from .optimizer import check_warmup
from .restore import restore
from .same_run import check_same_data
from .signals import stop_requests
from .task import Task


def train(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    callback: Callback | None = None,
    make_task: Callable[..., Task] = Task,
    watch: Callback | None = None,
) -> dict[str, Any]:
    """Train one network into a run directory.

    A run that was killed and is resumed ends bitwise identical to one that was not. Under
    `torchrun`, all processes train one network; only the first one writes files and calls
    `callback`.

    Args:
        config: the configuration. With `compare_dense`, a dense baseline is trained with the same
            training budget into `out`/dense.
        out: the run directory.
        resume: whether to continue the run in `out` from its last checkpoint, if there is one. A
            run that has finished is only read.
        callback: informed about the progress.
        make_task: creates the `Task`; pass a subclass to change a part of the training.
        watch: deprecated name of `callback`.

    Returns:
        The content of report.json.

    Raises:
        FeatherError: settings, data or files cannot be used, or the loss is not finite.
        Interrupted: Ctrl-C or SIGTERM. A checkpoint was written, unless the present step took
            longer than `system.stop_seconds`.

    Example:
        >>> import tempfile
        >>> config = Config(network="resnet8", sparsity=0.5, epochs=1, batch_size=512)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     train(config, folder)["report"]["sparsity"]
        0.5
    """
    callback = renamed_argument("train", "watch", watch, "callback", callback)
    with process_group() as ranks:
        callback = callback if callback is not None and ranks.first else Callback()
        run = RunDirectory(out)
        config = chosen(config, ranks, run if resume else None)
        results = _train_one(config, run, resume, callback, make_task, ranks)
        if config.compare_dense and "dense" not in results:
            baseline = run.dense_baseline()
            digest = results.get("data_digest")
            dense = _train_one(config.dense(), baseline, True, callback, make_task, ranks, digest)
            keys = ("test_accuracy", "test_loss", "macs", "seconds")
            results["dense"] = {key: dense[key] for key in keys}
            if ranks.first:
                with run.locked():
                    write_json(run.report_file, results)
        if ranks.first:
            _plot(run, results, callback)
    return results


def chosen(config: Config, ranks: Ranks, resumed: RunDirectory | None = None) -> Config:
    """Return a configuration in which the method and the automatic settings are chosen.

    Args:
        config: the configuration.
        ranks: the processes that train together.
        resumed: the run that continues. It keeps the method that it chose, and its options.

    Raises:
        FeatherError: data, initial weights or device cannot be used.

    Example:
        >>> chosen(Config(automatic=["batch_size"]), Ranks()).batch_size
        16
    """
    if config.method == AUTO and resumed is not None:
        before = ranks.on_first(resumed.stored_config)
        if before is not None and before.method_reason is not None:
            keys = ("method", "options", "method_reason")
            config = replace(config, **{key: getattr(before, key) for key in keys})
    if not config.automatic and config.method != AUTO:
        return config
    device = resolve_device(config.system.device, ranks)
    return ranks.local_first(partial(choose_settings, config, device))


def _train_one(
    config: Config,
    run: RunDirectory,
    resume: bool,
    callback: Callback,
    make_task: Callable[..., Task],
    ranks: Ranks,
    data_digest: str | None = None,
) -> dict[str, Any]:
    with ExitStack() as held, settings(config.system, ranks) as device:

        def begin() -> dict[str, Any] | None:
            held.enter_context(run.locked())
            run.check(config, resume, callback.message)
            if not run.holds_a_run():
                check_warmup(config)  # earlier versions began runs that do not pass
            if not run.report_file.exists():
                return None
            results = run.read_report()
            if not run.config_file.exists():
                run.write_config(config)
            return results

        results = ranks.on_first(begin)
        if results is not None:
            return results
        data = ranks.local_first(lambda: load_dataset(config.data, config.seed))
        config = with_class_names(config, data.names)
        task = _begin_or_resume(
            lambda config: make_task(config, data, device, ranks), config, run, callback, ranks
        )
        check_same_data(data_digest, task.data_identity, config)
        for note in filter(None, (*task.notes, config.method_reason)):
            callback.message(note)
        ranks.on_first(lambda: run.write_config(config))
        callback.begin(config, task.total_steps, task.step, run)
        try:
            with stop_requests(config.system.stop_seconds, run.resume_hint()) as stop_requested:
                task.fit(run, callback, stop_requested)
            results = task.finish(run)
        finally:
            callback.end(results)
        return results


def _begin_or_resume(
    make: Callable[[Config], Task],
    config: Config,
    run: RunDirectory,
    callback: Callback,
    ranks: Ranks,
) -> Task:
    """Return a new task, restored from the newest checkpoint that can be used, if there is one."""
    rejected: dict[Path, str] = {}
    while True:
        found = ranks.on_first(partial(newest, run.present_checkpoints(), rejected))
        if found is None:
            return make(config)
        # A checkpoint replaces the initial weights, whose file need not exist any more.
        task, reason = make(replace(config, init=None)), None
        try:
            restore(task, found.state)
        except DamagedCheckpoint as error:
            reason = str(error)
        reasons = [reason for reason in ranks.gather(reason) if reason is not None]
        if reasons:
            rejected = {**found.rejected, found.path: reasons[0]}
            continue
        ranks.on_first(partial(_continue, run, task, found.rejected, callback))
        return task


def _continue(run: RunDirectory, task: Task, rejected: dict[Path, str], callback: Callback) -> None:
    set_aside(rejected, callback.message)
    if task.history:  # of the checkpoint; metrics.jsonl may be missing or damaged
        run.write_metrics(task.history)
    callback.message(f"resuming {run.path} at step {task.step} of {task.total_steps}")


@contextmanager
def settings(system: SystemConfig, ranks: Ranks) -> Iterator[torch.device]:
    """Set PyTorch's global switches for a run, and restore them afterwards.

    Args:
        system: the settings.
        ranks: the processes that train together.

    Yields:
        The device of the run.

    Raises:
        RunError: the device does not exist.

    Example:
        >>> with settings(SystemConfig(device="cpu", deterministic=True), Ranks()) as device:
        ...     device, torch.are_deterministic_algorithms_enabled()
        (device(type='cpu'), True)
    """
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
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
    torch.use_deterministic_algorithms(system.deterministic, warn_only=True)
    cudnn.deterministic, cudnn.benchmark = system.deterministic, not system.deterministic
    # Filling would write each new tensor twice, in hundreds of calls per step; no code reads a
    # tensor before it is written.
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
    """Return the device of a name.

    Args:
        name: as for `torch.device`; `auto` is cuda if available, otherwise cpu.
        ranks: the processes that train together; each uses another GPU of its machine.

    Raises:
        RunError: the device does not exist.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
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
        raise RunError(f"device {name!r} cannot be used on this machine ({first})") from None
    return device


def _plot(run: RunDirectory, results: dict[str, Any], callback: Callback) -> None:
    try:
        from ..analysis.plots import plot_run
    except ImportError as error:
        callback.message(f"no plots: {error.name} is not installed. {install_hint('train')}")
        return
    plot_run(run.path, run.read_metrics(), results)
