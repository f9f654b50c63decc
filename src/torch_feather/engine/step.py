"""One optimizer step of sparse training, composed of the pieces of this package.

    forward, backward         parameters hold u = R(w); dL/du becomes dL/dw for each new gradient
    optimizer.step, before    gradients are completed; parameters become w
    optimizer.step            any optimizer updates w
    optimizer.step, after     the schedule advances; thresholds move; parameters become u = R(w)

The pieces take values and return values, and never call back. Only this file composes them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import devices
from ..errors import StateError, some
from ..prunable import Filters
from ..weights.latent import copy_all
from ..weights.ranges import forget_arrays
from .averages import warn_of_averages
from .binding import attached
from .foreign import release_optimizers, watch_optimizers
from .health import Health
from .hooks import Handlers, OptimizerHooks, only_initializes
from .late import LateWeights
from .loss_scale import watch_scalers
from .no_grad import no_grad
from .state_dict import StateDicts
from .step_in_backward import half_done, in_backward, incomplete
from .training import Training
from .turns import surplus, unequal
from .wrappers import levels_of


@dataclass
class OneOptimizer:
    """One optimizer in the step.

    Attributes:
        number: its position among the optimizers.
        optimizer: the optimizer.
        held: positions of its prunable weights.
        last: whether the schedule advances when it has stepped.
        holds_latent: whether its parameters hold latent weights now.
        initializes: whether the present step only initializes its state.
        in_backward: whether the present step is inside a backward pass.
        steps: number of its steps in this process.
        forward_values: values of its parameters in the forward pass, during a step inside the
            backward pass.

    Example:
        >>> from torch_feather import sparsify
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> one = sparsify(model, optimizer, sparsity=0.9, total_steps=2).step.optimizers[0]
        >>> one.held, one.last, one.holds_latent
        ([0], True, False)
    """

    number: int
    optimizer: Optimizer
    held: list[int]
    last: bool
    holds_latent: bool = False
    initializes: bool = False
    in_backward: bool = False
    steps: int = 0
    forward_values: list[Tensor] = field(default_factory=list)


class Step:
    """Composes hooks, weights, method and checks into the step of one or several optimizers.

    Args:
        training: the weights and the method on them.
        health: the checks after a step.
        states: reads and writes state dicts.
        filters: include and exclude, for parameters that are added to an optimizer later.

    Example:
        >>> from torch_feather import sparsify
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = sparsify(model, optimizer, sparsity=0.9, total_steps=2).step
        >>> optimizer.step()
        >>> int(step.training.count)
        1
    """

    def __init__(
        self,
        training: Training,
        health: Health,
        states: StateDicts,
        filters: tuple[Filters, Filters],
    ):
        self.training, self.health, self.states = training, health, states
        self._stepped, self.attached = False, True
        self._warned_of_averages = False
        binding = training.binding
        self._late = LateWeights(training.model, binding, filters)
        if training.method.facts.completes and len(binding.optimizers) > 1:
            watch_scalers()
        last = len(binding.optimizers) - 1
        self.optimizers = [
            OneOptimizer(o, one, binding.held_by(o), o == last)
            for o, one in enumerate(binding.optimizers)
        ]
        self._hooks = [
            OptimizerHooks(levels_of(one.optimizer), self._handlers(one)) for one in self.optimizers
        ]
        self._things = [level for hooks in self._hooks for level in hooks.levels]
        for thing in (*self._things, *binding.parameters):
            attached[thing] = weakref.ref(self)
        watch_optimizers()
        training.write_effective()

    def _handlers(self, one: OneOptimizer) -> Handlers:
        return Handlers(
            before=partial(self.before, one),
            ready=partial(self._ready, one),
            after=partial(self.after, one),
            closure=partial(self._inside_closure, one),
            failed=partial(self._failed, one),
            save=partial(self._save, one),
            load=partial(self._load, one),
            entries=partial(self._entries, one),
        )

    @no_grad
    def before(self, one: OneOptimizer, closure: bool, ready: bool = True) -> None:
        """Before a step of an optimizer: complete gradients; its parameters become w.

        Args:
            one: the optimizer.
            closure: whether the step has a closure, which computes the gradients later.
            ready: whether the gradients are ready; a wrapper may change them first.
        """
        self._late.warn(one.optimizer)
        self._check_surplus(one)
        one.initializes = only_initializes(one.optimizer)
        one.in_backward = self.training.in_backward.is_open or in_backward()
        if one.in_backward:
            self._before_in_backward(one, closure)
            return
        if one.initializes:
            self._settle(one)
        absorbed = ready and not closure and self.training.complete_gradients(one.optimizer)
        self._check_sparse_start()
        self._write_latent(one, check=not absorbed)

    @no_grad
    def _ready(self, one: OneOptimizer) -> None:
        """Within a step of a wrapper: complete its gradients, with effective weights."""
        if self.training.method.facts.completes and one.holds_latent:
            with self._inside_closure(one):
                pass

    @no_grad
    def after(self, one: OneOptimizer, taken: bool = True) -> None:
        """After a step of an optimizer: its parameters become u; the last one advances time.

        Args:
            one: the optimizer.
            taken: False if a wrapper skipped the step.
        """
        self._settle(one)
        if one.in_backward:
            self._after_in_backward(one)
            return
        self._read_latent(one)
        # A fused optimizer under GradScaler decides on the device whether it steps.
        skipped = getattr(one.optimizer, "found_inf", None)
        if skipped is None:
            counts: bool | Tensor = taken and not one.initializes
        else:
            counts = (skipped == 0) & taken
        one.steps += taken and not one.initializes
        self._advance(counts if one.last else False)

    def _advance(self, taken: bool | Tensor) -> None:
        """Advance the schedule if the step was taken; thresholds move; parameters become u."""
        training = self.training
        training.advance(taken)
        training.written.loaded = {}
        training.write_effective()
        if not self._stepped:
            self.warn_of_averages()
        self._stepped = True
        self.health.check(
            training.weights, training.binding.local, training.method, training.pruning,
            training.count, training.written.nonfinite,
        )  # fmt: skip

    def _write_latent(self, one: OneOptimizer, check: bool = False) -> None:
        self.training.write_latent(one.held, check)
        one.holds_latent = True

    def _read_latent(self, one: OneOptimizer) -> None:
        self.training.read_latent(one.held)
        one.holds_latent = False

    def _settle(self, one: OneOptimizer) -> None:
        """Record that the gradients of an optimizer are dL/dw."""
        if self.training.changes_gradients:
            self.training.assigned.settle(one.held, self.training.binding.parameters)

    @contextmanager
    def _inside_closure(self, one: OneOptimizer) -> Iterator[None]:
        """Around a closure: the network uses effective weights."""
        self._read_latent(one)
        self.training.write_effective()
        try:
            yield
            self.training.complete_gradients(one.optimizer)
            self._settle(one)
        finally:
            self._write_latent(one)

    def _failed(self, one: OneOptimizer) -> None:
        """After a step that raised: parameters become u again."""
        if one.holds_latent:
            self._read_latent(one)
        self.training.recover()

    def sync(self) -> None:
        """Outside of a step: let latent and effective weights follow external writes.

        Raises:
            StateError: a step inside the backward pass is incomplete.
        """
        if self.training.in_backward.is_open:
            if in_backward():
                raise half_done()
            self._raise_incomplete()
        in_step = any(one.holds_latent for one in self.optimizers)
        if self.attached and not in_step and self.training.absorb_external_writes():
            self.training.write_effective()

    def release(self) -> None:
        """Remove all hooks from optimizers and parameters."""
        self.attached = False
        self.training.release()
        forget_arrays(self.training.weights)
        for hooks in self._hooks:
            hooks.release()
        for thing in (*self._things, *self.training.binding.parameters):
            attached.pop(thing, None)
        self._things.clear()
        release_optimizers()

    def require_attached(self) -> None:
        """Raise StateError after `release`."""
        if not self.attached:
            raise StateError(
                "This sparsifier was finalized or detached. Call sparsify again for a new one."
            )

    def require_between_steps(self) -> None:
        """Raise StateError after `release`, or within a step of an optimizer."""
        self.require_attached()
        if any(hooks.stepping for hooks in self._hooks):
            raise StateError(
                "Within optimizer.step the parameters hold latent weights, so sparse training "
                "cannot end there: not in a closure, nor in a step hook that was registered before "
                "sparsify was called. Call finalize() or detach() after the step."
            )

    # Optimizers that step inside the backward pass

    def _before_in_backward(self, one: OneOptimizer, closure: bool) -> None:
        if not one.held:
            return
        fix = "Step after the backward pass: this optimizer steps inside it, and "
        if self.training.method.facts.completes:
            raise StateError(fix + "the method needs the gradients of all weights at once.")
        if closure or getattr(one.optimizer, "found_inf", None) is not None:
            raise StateError(fix + "neither closures nor GradScaler are supported there.")
        if isinstance(self.training.model, nn.parallel.DistributedDataParallel):
            raise StateError(fix + "DistributedDataParallel has not averaged the gradients yet.")
        if self.training.in_backward.has(one.number):
            self._raise_incomplete()
        self.training.absorb_external_writes()
        held = self.training.binding.local
        one.forward_values = [held[i].detach().clone() for i in one.held]
        self._write_latent(one)

    def _after_in_backward(self, one: OneOptimizer) -> None:
        if not one.held:
            return
        self._read_latent(one)
        held = self.training.binding.local
        copy_all([held[i] for i in one.held], one.forward_values)
        one.forward_values = []
        if self.training.in_backward.add(one.number):
            self._advance(True)

    def _raise_incomplete(self) -> None:
        missing = self.training.in_backward.missing()
        self.training.recover()
        weights = self.training.binding.weights
        raise incomplete(some([w.name for w in weights if w.optimizer in missing]))

    def warn_of_averages(self) -> None:
        """Warn once if another library averages the model, which would be dense."""
        if not self._warned_of_averages:
            self._warned_of_averages = warn_of_averages(self.training.binding.parameters)

    # State dicts

    def _save(self, one: OneOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.sync()
        return self.states.save(self.training, one.optimizer, one.held, state_dict)

    @no_grad
    def _entries(self, one: OneOptimizer) -> dict[Tensor, dict[str, Tensor]]:
        """Return the entries that a copy of an optimizer takes along."""
        self.sync()
        return self.states.live(self.training, one.optimizer, one.held)

    def _load(
        self, one: OneOptimizer, load_state_dict: Callable[..., Any], state_dict: dict[str, Any]
    ) -> Any:
        plain, entries = self.states.read(self.training, one.held, state_dict)
        result = load_state_dict(plain)
        self.states.load(self.training, entries, one.held)
        self.health.resume_at(int(self.training.count))
        return result

    def adopt_loaded_state(self) -> None:
        """Load latent weights that were loaded into the optimizers before `sparsify`.

        Raises:
            StateError: the state belongs to another run.
        """
        for one in self.optimizers:
            if self.states.adopt(self.training, one.optimizer, one.held):
                self.health.resume_at(int(self.training.count))

    # Checks of changes by other code

    def _check_sparse_start(self) -> None:
        """Raise if effective weights of another process replaced the local ones before step 1.

        The latent weights of that process were not copied. So training would continue with its
        zeros as latent weights.
        """
        if self._stepped or self.training.weights.shards is not None:
            return
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        if self._is_captured():
            return
        training = self.training
        every = range(len(training.weights.views))
        pruned = [training.method.pruned(training.weights, training.pruning, i) for i in every]
        zeros = [parameter.detach() == 0 for parameter in training.binding.parameters]
        counts = [sum(int(mask.sum()) for mask in masks) for masks in (pruned, zeros)]
        if 0 < counts[0] == counts[1] and not all(map(torch.equal, pruned, zeros)):
            raise StateError(
                "Between sparsify and the first step, the effective weights of another process "
                "replaced those of this one. DistributedDataParallel does so when it wraps a "
                "model. The latent weights were not replaced. Wrap the model first, then call "
                "sparsify. If the weights were loaded deliberately, call "
                "sparsifier.reset_latents()."
            )

    def _check_surplus(self, one: OneOptimizer) -> None:
        """Raise for a step beyond `total_steps` if another order of the optimizers was meant."""
        if len(self.optimizers) == 1 or not one.last or one.steps < 2:
            return
        if self._is_captured() or not (counts := self.unequal()):
            return
        others = [other.steps for other in self.optimizers if other.held]
        if min(others) < one.steps and int(self.training.count) >= self.states.total_steps:
            raise surplus(counts, self.states.total_steps)

    def unequal(self) -> str:
        """Return a sentence about optimizers that step unequally often; '' if they do not."""
        counted = [one for one in self.optimizers if one.held or one.last]
        names = [type(one.optimizer).__name__ for one in counted]
        return unequal(names, [one.steps for one in counted])

    def _is_captured(self) -> bool:
        """Return whether a CUDA graph is captured, when nothing can be read on the host."""
        accelerated = devices.synchronizes(self.training.weights.device)
        return accelerated and torch.cuda.is_current_stream_capturing()
