"""A training run in memory: the network, its data and optimizer, and its progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import torch_feather as feather

from .. import models
from .callbacks import Callback
from .checkpoint import RunDirectory, write_json
from .config import Config
from .data import Dataset, Text, data_identity, eval_loader, identity_digest, train_loader
from .distillation import make_distillation
from .distributed import Ranks
from .errors import CheckpointError, Interrupted, TrainingDiverged
from .evaluation import (
    StoppedEvaluation,
    bits,
    check_accepts,
    check_batches,
    evaluate,
    f1_score,
    until,
)
from .initial_weights import initialize
from .losses import check_outputs, make_loss
from .masks import record_masks
from .mixing import make_mixing
from .network_info import info_of_data
from .optimizer import learning_rate, make_optimizer
from .results import report_entries, teacher_entry
from .same_run import check_same_run, run_identity
from .sparsification import attach_sparsifier
from .step import Step


class Task:
    """The network, data and optimizer of a run, and its progress.

    Args:
        config: the configuration of the run.
        data: its data set.
        device: the device to train on.
        ranks: the processes that train together; None is this process alone.

    Raises:
        ConfigurationError: values that do not fit the network, the data or the device.

    Attributes:
        step: optimizer steps so far.
        epoch: epochs so far.
        images: images of the present epoch so far.
        seconds: duration of the training so far, without interruptions.
        history: the lines of metrics.jsonl.
        notes: what the user should know before the training starts.
        best: the best epoch so far and its network, if `config.select` is `best`.

    Example:
        >>> from .data import load_dataset
        >>> config = Config(network="resnet8", epochs=2, batch_size=128)
        >>> Task(config, load_dataset(config.data, 0), torch.device("cpu")).total_steps
        22
    """

    def __init__(
        self, config: Config, data: Dataset, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.data, self.device = config, data, device
        self.ranks = ranks or Ranks()
        layout = torch.channels_last if config.system.channels_last else torch.contiguous_format
        self.model = models.create(config.network, data.classes, data.channels)
        start = partial(initialize, self.model, config.init, config.network)
        self.notes = self.ranks.local_first(start)
        self.model.to(device).to(memory_format=layout)
        self.loader = train_loader(data, config, device, self.ranks)
        self.data_identity = self.ranks.on_first(lambda: data_identity(data))
        self.example = data.example().to(device)
        check_accepts(self.model, config.network, self.example)
        check_outputs(self.model, config, data, self.example)
        check_batches(self.model, self.example, config, len(data.train), self.ranks)
        self.total_steps = config.epochs * len(self.loader)
        self.optimizer = make_optimizer(
            self.model, config.optimizer, fused=True if config.system.cuda_graph else None
        )
        self.sparsifier = attach_sparsifier(
            config, self.model, self.optimizer, self.total_steps, self.example, self.ranks
        )
        self.distillation = make_distillation(config, data, device, layout, self.ranks)
        self.train_step = Step(
            self.model,
            self.optimizer,
            self.sparsifier,
            config,
            device,
            self.ranks,
            self.distillation,
            make_mixing(config.data, data.classes, data.train.labels),
        )
        # For evaluation; DistributedDataParallel would communicate for every batch.
        self.compiled: nn.Module | None = None
        if config.system.compile:
            self.compiled = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]
        # Without validation images, the test images are evaluated for the record only: the last
        # epoch is used, so they do not influence the choice.
        self.watched = "val" if len(data.validation) else "test"
        part = data.validation if self.watched == "val" else data.test
        self.watched_images = eval_loader(data, part, config, device, self.ranks)

        self.step = 0
        self.epoch = 0
        self.images = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        if self.ranks.count > 1:  # random numbers of the network, as of dropout, differ by rank
            torch.manual_seed(config.seed + self.ranks.rank)

    def fit(
        self,
        run: RunDirectory,
        callback: Callback,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train to the last epoch; write metrics and checkpoints.

        Args:
            run: the run directory.
            callback: informed about steps and epochs.
            stop_requested: called after each step; true ends the run after a checkpoint.

        Raises:
            Interrupted: `stop_requested` returned true.
            TrainingDiverged: the training loss is not finite.
        """
        system = self.config.system
        saved_at = time.monotonic()
        while self.epoch < self.config.epochs:
            began, before, position = time.perf_counter(), self.images, self.loader.state_dict()
            self.model.train()
            for batch in self.loader:
                self.train_step(batch, self.learning_rate(self.step))
                self.step += 1
                self.images += batch.total
                callback.step(batch.total)
                position = self.loader.state_dict()  # after the last batch, the next epoch begins
                due = time.monotonic() - saved_at >= system.checkpoint_seconds
                if system.checkpoint_steps is not None:
                    due = due or self.step % system.checkpoint_steps == 0
                # Ask once: a request between two calls would end the run without a checkpoint.
                stop, due = self.ranks.agree(stop_requested(), due)
                if stop or due:
                    self.save(run, began)
                    saved_at = time.monotonic()
                if stop:
                    raise Interrupted(
                        f"stopped at step {self.step} of {self.total_steps}; {run.resume_hint()}"
                    )
            try:
                self.end_epoch(self.images - before, began, stop_requested)
            except StoppedEvaluation:
                self.save(run, began, position)
                where = f"in the evaluation after step {self.step} of {self.total_steps}"
                raise Interrupted(f"stopped {where}; {run.resume_hint()}") from None
            if self.ranks.first:
                run.write_metrics(self.history)
                if self.config.track_masks and self.sparsifier is not None:
                    record_masks(self.sparsifier.masks().values(), run.path, self.epoch)
            callback.epoch(self.history[-1])
        self.save(run)

    def save(
        self, run: RunDirectory, began: float | None = None, position: dict | None = None
    ) -> None:
        """Write a checkpoint.

        Args:
            run: the run directory.
            began: when the present epoch began, by `time.perf_counter`; None between two epochs.
            position: state of the loader; None for its present state.
        """
        state = self.state_dict()
        state["loader"] = position or state["loader"]
        if began is not None:
            state["seconds"] = self.seconds + time.perf_counter() - began
        if self.ranks.first:
            run.save(state)

    def end_epoch(
        self, images: int, began: float, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        """Read the loss of the epoch, evaluate, and append the metrics to the history.

        Args:
            images: images that this process trained on since `began`.
            began: when the epoch began or was resumed, by `time.perf_counter`.
            stop_requested: with one process, called after each batch of the evaluation; true ends
                it, and nothing has changed.

        Raises:
            TrainingDiverged: the training loss is not finite.
        """
        train_loss = self.ranks.sum(self.train_step.loss_sum).item() / self.images
        elapsed = time.perf_counter() - began
        if not math.isfinite(train_loss):
            raise TrainingDiverged(
                f"the training loss became {train_loss} in epoch {self.epoch + 1}. "
                "Try a smaller optimizer.lr or a smaller optimizer.clip."
            )
        self.ranks.broadcast_buffers(self.model)
        epoch = self.epoch + 1
        measured: dict[str, float | None] = dict.fromkeys(
            ("val_loss", "val_acc", "test_loss", "test_acc")
        )
        if epoch == self.config.epochs or epoch % self.config.evaluate_every == 0:
            images_or_stop = until(stop_requested, self.watched_images)
            alone = self.ranks.count == 1  # otherwise all ranks would have to agree on each batch
            loss, accuracy = self.evaluate(images_or_stop if alone else self.watched_images)
            measured |= {f"{self.watched}_loss": loss, f"{self.watched}_acc": accuracy}
        self.epoch = epoch
        self.history.append(
            {
                "epoch": self.epoch,
                "step": self.step,
                "lr": self.learning_rate(self.step - 1),
                "train_loss": train_loss,
                **measured,
                "sparsity": feather.sparsity(self.model, self.config.include, self.config.exclude),
                "macs": feather.count_flops(self.model, self.example).sparse,
                "images_per_s": images / elapsed,
            }
        )
        self._update_best(measured["val_acc"])
        self.seconds = self.seconds + time.perf_counter() - began
        self.train_step.loss_sum.zero_()
        self.images = 0

    def evaluate(self, images: Any) -> tuple[float, float]:
        """Return loss and accuracy on the images of an `eval_loader`."""
        loss = make_loss(self.config, training=False)
        return evaluate(self.model, images, self.config.system.amp, self.ranks, self.compiled, loss)

    def _update_best(self, val_acc: float | None) -> None:
        """Keep this epoch if it is the best so far. Epochs before the target do not count."""
        at_target = self.sparsifier is None or self.sparsifier.at_target
        if self.config.select != "best" or val_acc is None or not at_target:
            return
        if self.best is None or val_acc > self.best["val_acc"]:
            model = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.best = {"epoch": self.epoch, "val_acc": val_acc, "model": model}
            self.best["thresholds"] = self._thresholds()

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0."""
        return learning_rate(self.config.optimizer, step, self.total_steps, len(self.loader))

    def finish(self, run: RunDirectory) -> dict[str, Any]:
        """Finalize, evaluate on the test images, and write model.safetensors and report.json.

        Args:
            run: the run directory.

        Returns:
            The content of report.json.
        """
        thresholds, learned_sparsity = self._thresholds(), None
        if self.sparsifier is not None:
            self.sparsifier.finalize()
            learned_sparsity = self.sparsifier.learned_sparsity
        chosen = self.epoch
        if self.config.select == "best":
            assert self.best is not None  # the last epoch is at the target
            self.model.load_state_dict(self.best["model"])
            chosen, thresholds = self.best["epoch"], self.best["thresholds"]
        test = eval_loader(self.data, self.data.test, self.config, self.device, self.ranks)
        test_loss, test_accuracy = self.evaluate(test)
        report = replace(
            feather.report(
                self.model,
                self.config.include,
                self.config.exclude,
                example_input=self.example,
                thresholds=thresholds or None,
            ),
            learned_sparsity=learned_sparsity,
        )
        if self.ranks.first:
            run.save_model(self.model, info_of_data(self.config, self.data).metadata())
        results = {
            **report_entries(
                self.config, self.data, identity_digest(self.data_identity), self.device, self.ranks
            ),
            "learned_sparsity": learned_sparsity,
            "epochs": self.epoch,
            "chosen_epoch": chosen,
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            **self._other_metrics(test, test_loss),
            "validation_accuracy": self.history[chosen - 1]["val_acc"],
            "train_loss": self.history[chosen - 1]["train_loss"],
            "macs": {"dense": report.dense_macs, "sparse": report.sparse_macs},
            "seconds": self.seconds,
            "teacher": teacher_entry(self.config, self.distillation, test, self.ranks),
            "report": report.to_dict(),
        }
        if self.ranks.first:
            write_json(run.report_file, results)
        return results

    def _other_metrics(self, test: Any, test_loss: float) -> dict[str, float]:
        """Return the F1 score of images with several labels; bits per character of a text."""
        if isinstance(self.data.test, Text):
            return {"test_bits_per_character": bits(test_loss)}
        if not self.data.multi_label:
            return {}
        return {"test_f1": f1_score(self.model, test, self.config.system.amp, self.ranks)}

    def _thresholds(self) -> dict[str, Tensor]:
        return self.sparsifier.thresholds() if self.sparsifier is not None else {}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the remaining steps depend on.

        The optimizer's state holds the latent weights.
        """
        return {
            **run_identity(self.config, self.data_identity, len(self.loader)),
            "method": self.config.method,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "ranks": self.ranks.gather(self._rank_state()),
            "step": self.step,
            "epoch": self.epoch,
            "images": self.images,
            "seconds": self.seconds,
            "history": self.history,
            "best": self.best,
            "teacher": self.distillation and self.distillation.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state of `state_dict`, also one of version 0.1, and continue from it.

        Raises:
            CheckpointError: the state is of another method or teacher, or of other settings or
                images.
        """
        if state.get("method", self.config.method) != self.config.method:
            raise CheckpointError(
                f"the checkpoint is of method {state['method']}, not {self.config.method}"
            )
        if state.get("teacher") != (self.distillation and self.distillation.digest):
            raise CheckpointError(
                "the checkpoint is of a run with another teacher or without one, or the weights of "
                f"the teacher have changed: {self.config.distillation.teacher}"
            )
        batches, ranks = len(self.loader), self.ranks.count
        check_same_run(state, self.config, self.data_identity, batches, ranks)
        self.model.load_state_dict(state["model"])
        fused = self.optimizer.param_groups[0].get("fused")
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            if "fused" in group:
                group["fused"] = fused  # depends on this machine, not on the state
        self.loader.load_state_dict(state["loader"])
        for key in ("step", "epoch", "images", "seconds", "history", "best"):
            setattr(self, key, state[key])
        states = state["ranks"]
        if len(states) == self.ranks.count:
            mine = states[self.ranks.rank]
            torch.set_rng_state(mine["rng"])
            if mine["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(mine["cuda_rng"], self.device)
            self.train_step.loss_sum.copy_(mine["loss_sum"])
        else:  # another number of processes: the same run, but not bitwise identical
            torch.manual_seed(self.config.seed + self.ranks.rank + self.step)
            if self.ranks.first:
                self.train_step.loss_sum.copy_(sum(one["loss_sum"] for one in states))

    def _rank_state(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "loss_sum": self.train_step.loss_sum.cpu(),
        }
