"""A network in training, and how far it has come."""

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
from ..allocation import FlopsBiased
from ..errors import ConfigurationError
from ..methods import method_options
from ..runtime import layer_milliseconds
from .checkpoint import RunDirectory, write_json
from .config import DENSE, Config, OptimizerConfig
from .data import Dataset, eval_loader, train_loader
from .distillation import Distillation, load_teacher
from .distributed import Ranks
from .errors import CheckpointError, Interrupted, TrainingDiverged
from .evaluation import evaluate
from .masks import record_masks
from .provenance import provenance
from .step import Step
from .watch import Watch
from .weights import read_weights

FLOPS = "flops^"  # begins the name of an allocation that needs an example of the data


class Task:
    """A network, its data and its optimizer, and how far they have come."""

    def __init__(
        self, config: Config, data: Dataset, device: torch.device, ranks: Ranks | None = None
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.data, self.device = config, data, device
        self.ranks = ranks or Ranks()
        layout = torch.channels_last if config.system.channels_last else torch.contiguous_format
        self.model = models.create(config.network, data.classes, data.channels)
        if (init := config.init) is not None:
            self.ranks.one_after_another(lambda: read_weights(init).fill(self.model))
        self.model.to(device).to(memory_format=layout)
        self.loader = train_loader(data, config, device, self.ranks)
        self.example = data.example().to(device)
        self._try_example()
        self.total_steps = config.epochs * len(self.loader)

        # Sparse training, as any user of the library writes it.
        self.optimizer = make_optimizer(
            self.model, config.optimizer, fused=True if config.system.graph else None
        )
        self.sparsifier = None
        if config.method != DENSE:
            options = dict(config.options)
            if str(options.get("allocation")).startswith(FLOPS):
                options["allocation"] = self._flops_biased(options["allocation"])
            if "example_input" in method_options(config.method):
                options |= self._costs(options.get("costs"))
            self.sparsifier = feather.sparsify(
                self.model,
                self.optimizer,
                config.method,
                sparsity=config.sparsity,
                total_steps=self.total_steps,
                include=config.include,
                exclude=config.exclude,
                **options,
            )
        self.distillation = self._distillation(layout)
        self.train_step = Step(
            self.model,
            self.optimizer,
            self.sparsifier,
            config,
            device,
            self.ranks,
            self.distillation,
        )
        # For evaluation: what wraps the model for several ranks would exchange at every batch.
        self.compiled: nn.Module | None = None
        if config.system.compile:
            self.compiled = torch.compile(self.model, dynamic=False)  # type: ignore[assignment]
        # Without validation images the test images are looked at for the record: they choose
        # nothing, the last epoch counts.
        self.watched = "val" if len(data.validation) else "test"
        part = data.validation if self.watched == "val" else data.test
        self.watched_images = eval_loader(data, part, config, device, self.ranks)

        self.step = 0
        self.epoch = 0
        self.images = 0  # of this epoch so far
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        if self.ranks.count > 1:  # what networks draw, such as dropout, differs between ranks
            torch.manual_seed(config.seed + self.ranks.rank)

    def _distillation(self, layout: torch.memory_format) -> Distillation | None:
        options = self.config.distillation
        if options.teacher is None:
            return None
        teacher = self.ranks.one_after_another(lambda: load_teacher(self.config, self.data))
        teacher.to(self.device).to(memory_format=layout)
        return Distillation(teacher, options, self.config.system.compile)

    def _flops_biased(self, allocation: str) -> FlopsBiased:
        """`flops^0.5`: ranks |w| / c^0.5, c the multiply-adds that a weight makes."""
        try:
            gamma = float(allocation.removeprefix(FLOPS))
        except ValueError:
            raise ConfigurationError(
                f"options.allocation: {allocation!r} is not {FLOPS!r} and a number, the bias, such "
                f"as {FLOPS}1."
            ) from None
        return FlopsBiased(gamma, example_input=self.example)

    def _costs(self, costs: Any) -> dict[str, Any]:
        """What a method that asks for costs is given: `milliseconds` of this CPU by that word."""
        if costs == "milliseconds":
            sparsity = self.config.sparsity
            measure = partial(layer_milliseconds, self.model, self.example, sparsity)
            return {"costs": self.ranks.on_first(measure)}
        return {"example_input": self.example} if costs is None else {}

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
        saved_at = time.monotonic()
        while self.epoch < self.config.epochs:
            began, before = time.perf_counter(), self.images
            self.model.train()
            for batch in self.loader:
                self.train_step(batch, self.learning_rate(self.step))
                self.step += 1
                self.images += batch.total
                watch.step(batch.total)
                due = time.monotonic() - saved_at >= system.checkpoint_seconds
                if system.checkpoint_steps is not None:
                    due = due or self.step % system.checkpoint_steps == 0
                # Asked once: a signal between two looks would save nothing.
                stop, due = self.ranks.agree(stop_requested(), due)
                if stop or due:
                    self.save(run, began)
                    saved_at = time.monotonic()
                if stop:
                    raise Interrupted(
                        f"stopped at step {self.step} of {self.total_steps}; {run.go_on()}"
                    )
            self.end_epoch(self.images - before, began)
            if self.ranks.first:
                run.write_metrics(self.history)
                if self.config.track_masks and self.sparsifier is not None:
                    record_masks(self.sparsifier.masks().values(), run.path, self.epoch)
            watch.epoch(self.history[-1])
        self.save(run)

    def save(self, run: RunDirectory, began: float | None = None) -> None:
        """Write a checkpoint; `began` is when an unfinished epoch did."""
        state = self.state_dict()
        if began is not None:
            state["seconds"] = self._clock(began)
        if self.ranks.first:
            run.save(state)

    def end_epoch(self, images: int, began: float) -> None:
        """Read the epoch's loss, evaluate, and add a line to the history."""
        train_loss = self.ranks.sum(self.train_step.loss_sum).item() / self.images
        elapsed = time.perf_counter() - began
        if not math.isfinite(train_loss):
            raise TrainingDiverged(
                f"the training loss became {train_loss} in epoch {self.epoch + 1}; "
                "try a smaller optimizer.lr or a smaller optimizer.clip"
            )
        self.epoch += 1
        self.ranks.same_buffers(self.model)
        last = self.epoch == self.config.epochs
        seen: dict[str, float | None] = dict.fromkeys(
            ("val_loss", "val_acc", "test_loss", "test_acc")
        )
        if last or self.epoch % self.config.evaluate_every == 0:
            loss, accuracy = self.evaluate(self.watched_images)
            seen |= {f"{self.watched}_loss": loss, f"{self.watched}_acc": accuracy}
        self.history.append(
            {
                "epoch": self.epoch,
                "step": self.step,
                "lr": self.learning_rate(self.step - 1),
                "train_loss": train_loss,
                **seen,
                "sparsity": feather.sparsity(self.model, self.config.include, self.config.exclude),
                "macs": feather.count_flops(self.model, self.example).sparse,
                "images_per_s": images / elapsed,
            }
        )
        self._consider(seen["val_acc"])
        self.seconds = self._clock(began)
        self.train_step.loss_sum.zero_()
        self.images = 0

    def evaluate(self, images: Any) -> tuple[float, float]:
        """Loss and accuracy on images of an `eval_loader`."""
        return evaluate(self.model, images, self.config.system.amp, self.ranks, self.compiled)

    def _consider(self, val_acc: float | None) -> None:
        """Keep this epoch if it is the best so far; denser ones before the target do not count."""
        at_target = self.sparsifier is None or self.sparsifier.at_target
        if self.config.select != "best" or val_acc is None or not at_target:
            return
        if self.best is None or val_acc > self.best["val_acc"]:
            model = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.best = {
                "epoch": self.epoch,
                "val_acc": val_acc,
                "model": model,
                "thresholds": self._thresholds(),
            }

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
        macs = feather.count_flops(self.model, self.example)
        if self.ranks.first:
            run.save_model(self.model)
        results = {
            "network": self.config.network,
            "data": self.config.data.name,
            "classes": self.data.classes,
            "input_shape": list(self.example.shape[1:]),  # of one image, (C, H, W)
            "method": self.config.method,
            "target_sparsity": self.config.sparsity,
            "own_sparsity": learned_sparsity,  # what the method reached by itself
            "seed": self.config.seed,
            "epochs": self.epoch,
            "chosen_epoch": chosen,
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "validation_accuracy": self.history[chosen - 1]["val_acc"],
            "train_loss": self.history[chosen - 1]["train_loss"],
            "macs": {"dense": macs.dense, "sparse": macs.sparse},
            "seconds": self.seconds,
            "teacher": self._about_teacher(test),
            "report": report.to_dict(),
            **provenance(self.device),
        }
        if self.ranks.count > 1:
            results["hardware"]["processes"] = self.ranks.count
        if self.ranks.first:
            write_json(run.report_file, results)
        return results

    def _about_teacher(self, test: Any) -> dict[str, Any] | None:
        if self.distillation is None:
            return None
        amp, teacher = self.config.system.amp, self.distillation.teacher
        loss, accuracy = evaluate(teacher, test, amp, self.ranks)
        return {
            "source": self.config.distillation.teacher,
            "sha256": self.distillation.digest,
            "test_accuracy": accuracy,
            "test_loss": loss,
        }

    def _thresholds(self) -> dict[str, Tensor]:
        return self.sparsifier.thresholds() if self.sparsifier is not None else {}

    def _clock(self, began: float) -> float:
        return self.seconds + time.perf_counter() - began

    def state_dict(self) -> dict[str, Any]:
        """All that the remaining steps depend on. The optimizer's holds the latent weights."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "ranks": self.ranks.gather(self._of_this_rank()),
            "step": self.step,
            "epoch": self.epoch,
            "images": self.images,
            "seconds": self.seconds,
            "history": self.history,
            "best": self.best,
            "teacher": self.distillation and self.distillation.digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        if state.get("teacher") != (self.distillation and self.distillation.digest):
            raise CheckpointError(
                "the run that is to go on was trained with another teacher, or without one, or the "
                f"weights of its teacher changed since: {self.config.distillation.teacher}"
            )
        self.model.load_state_dict(state["model"])
        fused = self.optimizer.param_groups[0]["fused"]
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"] = fused  # belongs to this machine, not to the state
        self.loader.load_state_dict(state["loader"])
        for key in ("step", "epoch", "images", "seconds", "history", "best"):
            setattr(self, key, state[key])
        own = state["ranks"]
        if len(own) == self.ranks.count:
            mine = own[self.ranks.rank]
            torch.set_rng_state(mine["rng"])
            if mine["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(mine["cuda_rng"], self.device)
            self.train_step.loss_sum.copy_(mine["loss_sum"])
        else:  # the same training on other machines, though not to the bit
            torch.manual_seed(self.config.seed + self.ranks.rank + self.step)
            if self.ranks.first:
                self.train_step.loss_sum.copy_(sum(one["loss_sum"] for one in own))

    def _of_this_rank(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
            "loss_sum": self.train_step.loss_sum.cpu(),
        }


def make_optimizer(
    model: nn.Module, options: OptimizerConfig, fused: bool | None = None
) -> torch.optim.SGD:
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
        fused=fused,
    )
