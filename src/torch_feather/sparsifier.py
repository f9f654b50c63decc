"""`Sparsifier`: the handle of a user on the sparse training of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .context import MethodContext
from .deprecation import renamed_names, warn_renamed
from .engine.attachment import Attachment
from .engine.binding import bind
from .engine.copies import NotPickled
from .engine.finish import check_count, settle
from .engine.gradients import check_passes, own_parameters
from .engine.health import Health, count_pruned_by
from .engine.state_dict import StateDicts
from .engine.training import Training
from .engine.turns import not_reached
from .errors import StateError, printable, warn
from .finetune import FixedMask
from .measure.report import Report, report
from .methods.base import AnyMethod
from .participants import forget, remember
from .prunable import Filters, find_prunable
from .weights.counts import count_zeros
from .weights.latent import LatentWeights
from .weights.ranks import check_ranks
from .weights.shards import shard_like

__getattr__ = renamed_names(__name__, {"sparsify": "sparsify"}, "torch_feather")


class Sparsifier(NotPickled):
    """Keeps a model sparse while an optimizer trains it; created by `sparsify`.

    Attributes:
        model: the model, as it was given.
        method: the description of the method; with "auto" a `methods.chosen.Chosen`.
        target: final fraction of zeros among the prunable weights.
        total_steps: optimizer steps of the whole training.
        step: the engine; internal.

    Example:
        >>> from torch_feather import sparsify
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = sparsify(model, optimizer, sparsity=0.9, total_steps=8)
        >>> for _ in range(4):
        ...     optimizer.step()
        >>> sparsifier.sparsity, sparsifier.step_count, sparsifier.at_target
        (0.9, 4, True)
        >>> int(sparsifier.masks()["weight"].sum())  # kept weights
        10
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        method: AnyMethod,
        sparsity: float,
        total_steps: int,
        include: Filters = None,
        exclude: Filters = None,
    ):
        self.model, self.method = model, method
        self.target, self.total_steps = sparsity, total_steps
        prunable = find_prunable(model, include, exclude, frozen=False)
        binding = bind(model, prunable, optimizer)
        weights = LatentWeights(binding.parameters)
        self._health = Health(model, binding.names, total_steps)
        self._health.raise_if_nan(weights, binding.local)
        bound = method.bind(MethodContext(model, binding.names, weights, sparsity, total_steps))
        binding.check_followed(bound)  # before hooks are registered
        training = Training(model, binding, weights, bound)
        self._states = StateDicts(sparsity, total_steps, bound.fingerprint, method)
        self._fixed_mask: FixedMask | None = None
        self._learned_sparsity, self._reached = 0.0, False  # values at the time of the release
        self.attachment = Attachment(training, self._health, self._states, (include, exclude))
        self.step = self.attachment.step
        try:
            self.attachment.adopt_loaded_state()
        except Exception:  # a warning too, if it is raised
            self._restore_latent()
            raise
        remember(model, prunable)
        if bound.target_step == 0:
            self._inspect()

    @property
    def _training(self) -> Training:
        return self.step.training

    # Position and sparsity

    @property
    def step_count(self) -> int:
        """Optimizer steps taken; skipped ones do not count."""
        return int(self._training.count)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is pruned now."""
        training = self._training
        if self.attachment.is_open:
            self.attachment.sync()
            counts = count_pruned_by(training.method, training.weights, training.pruning)
        else:
            zeros = [count_zeros(part) for part in training.binding.local]
            counts = training.weights.total(torch.stack(zeros))
        return int(counts.sum()) / training.weights.size

    @property
    def at_target(self) -> bool:
        """Whether the sparsity is the final one.

        Earlier models are denser and usually more accurate. Choose a best checkpoint only among
        models at the target.
        """
        if not self.attachment.is_open:
            return self._reached
        return self.step_count >= self._training.method.target_step

    @property
    def target_step(self) -> int:
        """Optimizer step from which on the sparsity is the final one."""
        return self._training.method.target_step

    @property
    def learned_sparsity(self) -> float:
        """Fraction of the prunable weights that the method prunes without the exact count.

        Methods that learn their thresholds do not reach a target exactly. The final exact-count
        pruning corrects their count. For all other methods this is `sparsity`.
        """
        if not self.attachment.is_open:
            return self._learned_sparsity
        self.attachment.sync()
        training = self._training
        counts = training.method.summary(training.weights, training.pruning).learned_counts
        return self.sparsity if counts is None else int(counts.sum()) / training.weights.size

    def thresholds(self) -> dict[str, Tensor]:
        """Return the current threshold tau of each weight tensor, by name; 0-dimensional."""
        self.attachment.sync()
        training = self._training
        return {
            name: training.method.threshold(training.weights, training.pruning, i).clone()
            for i, name in enumerate(training.binding.names)
        }

    def masks(self) -> dict[str, Tensor]:
        """Return the masks of kept weights (True), by name; shaped and sharded as the weights."""
        training = self._training
        if not self.attachment.is_open:
            return self._by_name([part.detach() != 0 for part in training.binding.local])
        self.attachment.sync()
        every = range(len(training.weights.views))
        method, weights = training.method, training.weights
        return self._by_name([~method.pruned(weights, training.pruning, i) for i in every])

    def latent_weights(self) -> dict[str, Tensor]:
        """Return copies of the dense weights that the optimizer trains, by name."""
        self.attachment.require_open()
        self.attachment.sync()
        return self._by_name([view.clone() for view in self._training.weights.views])

    def _by_name(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return local shards as tensors sharded like the weights, by name."""
        pairs = zip(self._training.binding.weights, parts, strict=True)
        return {weight.name: shard_like(part, weight.parameter) for weight, part in pairs}

    def report(self, example_input: Any = None) -> Report:
        """Return zeros, sparsity and threshold per layer.

        Args:
            example_input: an input of the model, to count multiply-adds with.
        """
        self.attachment.sync()
        names = set(self._training.binding.names)
        found = report(
            self.model,
            include=lambda _, name: name in names,
            example_input=example_input,
            thresholds={name: float(tau) for name, tau in self.thresholds().items()},
        )
        return replace(found, learned_sparsity=self.learned_sparsity)

    @torch.no_grad()
    def check_ranks(self) -> None:
        """Raise unless all processes hold the same weights, bit for bit.

        With DistributedDataParallel, masks and latent weights of all processes are compared. Of
        sharded weights, those that several processes hold are compared. Only checksums are
        exchanged. All processes must call it, for example every 100 steps.

        Raises:
            StateError: names the weights and the ranks that differ from the first; on all ranks.
        """
        self.attachment.sync()
        binding, training = self._training.binding, self._training
        check_ranks(self.model, binding.names, binding.parameters, training.weights, training.count)

    # Parameters and gradients of the method

    def parameters(self) -> list[Tensor]:
        """Return the parameters of the method itself, such as learned thresholds.

        They step after the optimizer and must not be passed to it. Most methods have none. To clip
        their gradients too, call `complete_gradients()` first.
        """
        return own_parameters(self._training.method) if self.attachment.is_open else []

    @property
    def clips_own_parameters(self) -> bool:
        """Whether `parameters()` belong in a gradient norm that is clipped over all gradients."""
        return self._training.method.facts.clips_own

    @torch.no_grad()
    def complete_gradients(self) -> None:
        """Add the terms that need the gradients of all weights; otherwise `optimizer.step` does.

        Afterwards the gradients of the model are complete, and `parameters()` have their `.grad`,
        penalties included. Gradients that were assigned to `.grad`, such as those of
        `torch.func.grad`, become gradients of the latent weights. Call it after the last backward
        pass of a step, before clipping. With a `GradScaler`, first call `scaler.unscale_` on each
        optimizer. Without new gradients, and after `finalize`, it does nothing.
        """
        if self.attachment.is_open:
            self._training.complete_gradients()

    def passes(self, count: int | None = None) -> Iterator[float]:
        """Iterate over the forward and backward passes of one step; gradients accumulate.

            for fraction in sparsifier.passes():
                (fraction * loss(model(x), y)).backward()
            optimizer.step()

        A method with random masks draws one for each pass. If a batch is processed in parts, put
        the loop over the parts inside this one.

        Args:
            count: number of passes. Default: the method's option `passes`, or 1.

        Yields:
            1 / count, the weight of a pass in the loss.
        """
        count = check_passes(self._training.method.facts.passes if count is None else count)
        for number in range(count):
            if self.attachment.is_open:
                self._training.begin_pass(number)
            yield 1 / count
            if count > 1 and self.attachment.is_open:
                self._training.end_pass()

    def __getattr__(self, name: str) -> Any:
        if name == "own_sparsity":
            warn_renamed("Sparsifier.own_sparsity", "Sparsifier.learned_sparsity")
            return self.learned_sparsity
        # Also called if a property raised AttributeError: raise the original error again.
        return object.__getattribute__(self, name)

    # The end

    def finalize(self, *, force: bool = False, keep_masks: bool = False) -> nn.Module:
        """End sparse training: plain modules, plain keys, exact zeros, no hooks.

        If the model was modified externally and has the target sparsity, it is kept as it is. An
        example is the best checkpoint, which some frameworks load after training.

        Args:
            force: end even if the target is not reached.
            keep_masks: whether training continues. Until `detach()`, pruned weights then stay 0,
                which momentum would change, and their gradients are 0. After a restart of that
                phase, use `keep_zeros(model, optimizer)`.

        Returns:
            The model.

        Raises:
            StateError: the target is not reached, or not exactly; or within a step.
            NonFiniteWeightError: a parameter of the model, or a threshold, is not finite.
        """
        self.attachment.require_between_steps()
        if not self.at_target and not force:
            steps = self.step_count, self.total_steps
            raise not_reached(*steps, self.sparsity, self.target, self.step.turns.unequal())
        training = self._training
        kept, pruned_again = settle(training, self.attachment.sync)
        state = training.weights, training.pruning
        pruned, summary = count_pruned_by(training.method, *state), training.method.summary(*state)
        learned = pruned if summary.learned_counts is None else summary.learned_counts
        self._learned_sparsity = int(learned.sum()) / training.weights.size
        self._reached = self.at_target
        self._inspect(final=True, pruned=pruned)
        self._health.raise_if_not_finite(
            training.weights,
            training.binding.local,
            training.method,
            training.pruning,
            latent=pruned_again,
        )
        self.step.warn_of_averages()
        if self._reached and training.method.facts.exact and not force:
            check_count(int(pruned.sum()), training.weights.size, self.target)
        if self._reached and summary.violation:
            warn(f"The network has its target sparsity, but {summary.violation}")
        self.attachment.release()
        if keep_masks:
            # A kept weight that happens to be 0, as in a layer that starts at 0, is still trained.
            every = range(len(training.weights.views))
            masks = [training.method.pruned(*state, i) for i in every]
            self._fixed_mask = FixedMask(
                training.binding.parameters,
                training.binding.optimizers,
                None if kept else masks,
            )
        return self.model

    def detach(self) -> nn.Module:
        """Remove all hooks; the model keeps the dense latent weights.

        After `finalize(keep_masks=True)` it only stops keeping the zeros: the model stays sparse.
        """
        if self._fixed_mask is not None:
            self._fixed_mask.remove()
            self._fixed_mask = None
            return self.model
        self.attachment.require_between_steps()
        self._restore_latent()
        forget(self.model)
        return self.model

    def _restore_latent(self) -> None:
        self.attachment.sync()
        self._training.write(self._training.weights.views)
        self.attachment.release()

    def reset_latents(self) -> None:
        """Set the latent weights to the present values of the parameters, zeros included."""
        self.attachment.require_open()
        training = self._training
        training.follow_parameters()
        training.read_latent(range(len(training.binding.weights)))
        training.write_effective()

    def _inspect(self, final: bool = False, pruned: Tensor | None = None) -> None:
        t = self._training
        state = t.weights, t.binding.local, t.method, t.pruning, t.count
        self._health.inspect(*state, final, pruned)

    # Saving and loading

    def state_dict(self) -> dict[str, Any]:
        """Return latent weights, state of the method and step, by name of the weight.

        Not needed if the optimizer's state dict is saved, which contains the same.
        """
        self.attachment.sync()
        names = self._training.binding.names
        return {name: self._states.export(self._training, i) for i, name in enumerate(names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict()`.

        Raises:
            StateError: it belongs to another model, method, target or number of steps.
        """
        self.attachment.require_open()
        names = self._training.binding.names
        every = range(len(names))
        if not isinstance(state, Mapping) or not all(
            isinstance(own, Mapping) for own in state.values()
        ):
            raise StateError("Expected what Sparsifier.state_dict() returned, got something else.")
        found = {i: state[name] for i, name in enumerate(names) if name in state}
        foreign = [printable(name) for name in state if name not in names]
        loaded = self._states.check(self._training, found, every, foreign)
        self._states.load(self._training, loaded, every)
        self._health.resume_at(self.step_count)

    @contextmanager
    def relaxed_loading(self) -> Iterator[None]:
        """Return a context in which states of other methods, targets and total steps can be loaded.

        The step, and latent weights of the right shape, are loaded. Latent weights that the state
        does not have restart from the parameters.
        """
        before, self._states.strict = self._states.strict, False
        try:
            yield
        finally:
            self._states.strict = before
