"""The training loop, and what surrounds it in a run directory."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_feather as feather

from .. import models
from ..errors import ConfigurationError
from ..prunable import find_prunable
from .checkpoint import RunDirectory, write_json
from .config import DENSE, Config, OptimizerConfig, SystemConfig
from .data import Dataset, EvalLoader, TrainLoader, load_dataset
from .errors import Interrupted, RunError, TrainingDiverged
from .provenance import provenance


class Watch:
    """What a run tells its observer; this one is not interested."""

    def message(self, text: str) -> None:
        """Something worth a line."""

    def begin(self, config: Config, steps: int, done: int) -> None:
        """Training starts at step `done` of `steps`."""

    def step(self) -> None:
        """One optimizer step was taken."""

    def epoch(self, metrics: dict[str, Any]) -> None:
        """An epoch ended."""

    def end(self) -> None:
        """The steps are over, whether they were completed or not."""


def train(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    watch: Watch | None = None,
    make_task: Callable[..., Task] | None = None,
) -> dict[str, Any]:
    """Train one network into the run directory `out`; returns what report.json holds.

    With `resume`, a run that was killed goes on from its last checkpoint and ends with the same
    bits; one that has finished is only read. With `config.compare_dense` the dense network is
    trained with the same budget into `out`/dense. `make_task` stands in for `Task`, for a run
    that differs in one of its methods.

    Raises:
        FeatherError: settings, data or files that cannot be used; a loss that is not finite.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    watch = watch or Watch()
    run = RunDirectory(out)
    make_task = make_task or Task
    results = _train_one(config, run, resume, watch, make_task)
    if config.compare_dense and "dense" not in results:
        dense = _train_one(config.dense(), run.dense_twin(), True, watch, make_task)
        keys = ("test_accuracy", "test_loss", "macs", "seconds")
        results["dense"] = {key: dense[key] for key in keys}
        with run.locked():
            write_json(run.report_file, results)
    _draw(run, results, watch)
    return results


def _train_one(
    config: Config,
    run: RunDirectory,
    resume: bool,
    watch: Watch,
    make_task: Callable[..., Task],
) -> dict[str, Any]:
    with run.locked(), _settings(config.system) as device:
        saved = run.begin(config, resume, watch.message)
        if run.report_file.exists():
            return run.read_report()
        data = load_dataset(config.data, config.seed)
        task = make_task(config, data, device)
        run.write_config(config)
        if saved is not None:
            task.load_state_dict(saved)
            watch.message(f"resuming {run.path} at step {task.step} of {task.total_steps}")
        with _stop_requests() as stop_requested:
            task.fit(run, watch, stop_requested)
        return task.finish(run)


class Task:
    """A network, its data and its optimizer, and how far they have come."""

    def __init__(self, config: Config, data: Dataset, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.data, self.device = config, data, device
        channels_last = config.system.channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = models.create(config.network, data.classes, data.channels)
        self.model.to(device).to(memory_format=layout)
        self.network = torch.compile(self.model) if config.system.compile else self.model
        self.loader = TrainLoader(
            data, config.data, config.batch_size, config.seed, device, channels_last
        )
        self.validation = EvalLoader(data, data.validation, device)
        self.example = data.example().to(device)
        self._try_example()
        self.total_steps = config.epochs * len(self.loader)

        # Sparse training, as any user of the library writes it.
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.sparsifier = None
        if config.method != DENSE:
            self.sparsifier = feather.sparsify(
                self.model,
                self.optimizer,
                config.method,
                sparsity=config.sparsity,
                total_steps=self.total_steps,
                **config.options,
            )

        self.prunable = sum(p.parameter.numel() for p in find_prunable(self.model))
        self.step = 0
        self.epoch = 0
        self.loss_sum = torch.zeros((), device=device)  # of this epoch; read once, at its end
        self.images = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None

    def _try_example(self) -> None:
        """Fail now, in one line, rather than in the first step."""
        try:
            feather.count_flops(self.model, self.example)
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            size = "x".join(map(str, self.example.shape[1:]))
            raise ConfigurationError(
                f"network {self.config.network!r} does not take images of {size}: {first}"
            ) from None

    def fit(
        self, run: RunDirectory, watch: Watch, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        """Train to the last epoch, leaving metrics and checkpoints in `run`."""
        system = self.config.system
        watch.begin(self.config, self.total_steps, self.step)
        saved_at = time.monotonic()
        try:
            while self.epoch < self.config.epochs:
                began, before = time.perf_counter(), self.images
                self.model.train()
                for x, y in self.loader:
                    self.train_step(x, y)
                    watch.step()
                    due = time.monotonic() - saved_at >= system.checkpoint_seconds
                    if system.checkpoint_steps is not None:
                        due = due or self.step % system.checkpoint_steps == 0
                    stop = stop_requested()  # once: a signal between two looks would save nothing
                    if stop or due:
                        run.save(self.state_dict() | {"seconds": self._clock(began)})
                        saved_at = time.monotonic()
                    if stop:
                        raise Interrupted(
                            f"stopped at step {self.step} of {self.total_steps}; {run.go_on()}"
                        )
                self.end_epoch(self.images - before, began)
                run.write_metrics(self.history)
                watch.epoch(self.history[-1])
            run.save(self.state_dict())
        finally:
            watch.end()

    def train_step(self, x: Tensor, y: Tensor) -> None:
        """One step. Nothing here waits for the device."""
        options = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.system.amp):
            loss = F.cross_entropy(self.network(x), y, label_smoothing=options.label_smoothing)
        loss.backward()
        if options.clip is not None:
            extra = self.sparsifier.parameters() if self.sparsifier else []
            nn.utils.clip_grad_norm_([*self.model.parameters(), *extra], options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += loss.detach() * len(y)
        self.images += len(y)
        self.step += 1

    def end_epoch(self, images: int, began: float) -> None:
        """Read the epoch's loss, evaluate, and add a line to the history."""
        train_loss = self.loss_sum.item() / self.images
        elapsed = time.perf_counter() - began
        if not math.isfinite(train_loss):
            raise TrainingDiverged(
                f"the training loss became {train_loss} in epoch {self.epoch + 1}; "
                "try a smaller optimizer.lr or a smaller optimizer.clip"
            )
        self.epoch += 1
        last = self.epoch == self.config.epochs
        val_loss = val_acc = None
        if len(self.data.validation) and (last or self.epoch % self.config.evaluate_every == 0):
            val_loss, val_acc = evaluate(self.model, self.validation, self.config.system.amp)
        self.history.append(
            {
                "epoch": self.epoch,
                "step": self.step,
                "lr": self.learning_rate(self.step - 1),
                "train_loss": train_loss,
                "val_loss": val_loss,
                "val_acc": val_acc,
                "sparsity": feather.sparsity(self.model),
                "macs": feather.count_flops(self.model, self.example).sparse,
                "images_per_s": images / elapsed,
            }
        )
        self._consider(val_acc)
        self.seconds = self._clock(began)
        self.loss_sum.zero_()
        self.images = 0

    def _consider(self, val_acc: float | None) -> None:
        """Keep this epoch if it is the best so far; denser ones before the target do not count."""
        if self.config.select != "best" or val_acc is None or not self.at_target():
            return
        if self.best is None or val_acc > self.best["val_acc"]:
            model = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.best = {
                "epoch": self.epoch,
                "val_acc": val_acc,
                "model": model,
                "thresholds": self._thresholds(),
            }

    def at_target(self) -> bool:
        """Whether the network is as sparse now as it has to be in the end."""
        if self.sparsifier is None:
            return True
        now, target = self.sparsifier.sparsity, self.sparsifier.target
        return round(now * self.prunable) == round(target * self.prunable)

    def learning_rate(self, step: int) -> float:
        """Of the step with this number, from 0: linear warm-up, then a cosine to 0."""
        options = self.config.optimizer
        warmup = round(options.warmup_epochs * len(self.loader))
        if step < warmup:
            return options.lr * ((step + 1) / warmup)
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return options.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def finish(self, run: RunDirectory) -> dict[str, Any]:
        """Finalize, measure on the test images, write model.safetensors and report.json."""
        thresholds = self._thresholds()
        if self.sparsifier is not None:
            self.sparsifier.finalize()
        chosen = self.epoch
        if self.config.select == "best":
            assert self.best is not None  # the last epoch is at the target
            self.model.load_state_dict(self.best["model"])
            chosen, thresholds = self.best["epoch"], self.best["thresholds"]
        test = EvalLoader(self.data, self.data.test, self.device)
        test_loss, test_accuracy = evaluate(self.model, test, self.config.system.amp)
        report = feather.report(
            self.model, example_input=self.example, thresholds=thresholds or None
        )
        macs = feather.count_flops(self.model, self.example)
        run.save_model(self.model)
        results = {
            "network": self.config.network,
            "data": self.config.data.name,
            "method": self.config.method,
            "target_sparsity": self.config.sparsity,
            "seed": self.config.seed,
            "epochs": self.epoch,
            "chosen_epoch": chosen,
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "validation_accuracy": self.history[chosen - 1]["val_acc"],
            "train_loss": self.history[chosen - 1]["train_loss"],
            "macs": {"dense": macs.dense, "sparse": macs.sparse},
            "seconds": self.seconds,
            "report": report.to_dict(),
            **provenance(self.device),
        }
        write_json(run.report_file, results)
        return results

    def _thresholds(self) -> dict[str, Tensor]:
        return self.sparsifier.thresholds() if self.sparsifier is not None else {}

    def _clock(self, began: float) -> float:
        return self.seconds + time.perf_counter() - began

    def state_dict(self) -> dict[str, Any]:
        """All that the remaining steps depend on. The optimizer's holds the latent weights."""
        cuda = self.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "step": self.step,
            "epoch": self.epoch,
            "loss_sum": self.loss_sum,
            "images": self.images,
            "seconds": self.seconds,
            "history": self.history,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        for key in ("step", "epoch", "images", "seconds", "history", "best"):
            setattr(self, key, state[key])
        self.loss_sum.copy_(state["loss_sum"])


def make_optimizer(model: nn.Module, options: OptimizerConfig) -> torch.optim.SGD:
    """SGD where vectors and scalars (biases, norms) do not decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if p.ndim > 1],
            "weight_decay": options.weight_decay,
        },
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=options.lr,
        momentum=options.momentum,
        nesterov=options.nesterov,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], amp: bool = False
) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers, with the model in evaluation mode."""
    training = model.training
    model.eval()
    loss: Tensor | float = 0.0
    right: Tensor | float = 0.0
    count = 0
    for x, y in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits = model(x).float()
        loss = loss + F.cross_entropy(logits, y, reduction="sum")
        right = right + (logits.argmax(1) == y).sum()
        count += len(y)
    model.train(training)
    return float(loss) / count, float(right) / count


@contextmanager
def _settings(system: SystemConfig) -> Iterator[torch.device]:
    """PyTorch's global switches as the run wants them, put back afterwards."""
    cudnn = torch.backends.cudnn
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
    )
    if system.threads is not None:
        torch.set_num_threads(system.threads)
    if system.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(system.deterministic, warn_only=True)
    cudnn.deterministic, cudnn.benchmark = system.deterministic, not system.deterministic
    try:
        yield resolve_device(system.device)
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        cudnn.deterministic, cudnn.benchmark = before[3:]


def resolve_device(name: str) -> torch.device:
    """`auto` is cuda where there is one, else cpu. `RunError` for one that does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
