"""A step and the optimizers that take it: hooks, state dicts, and the end.

The handlers of hooks are methods of `step.py`, and those of `Attachment` that save and load.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import StateError
from ..prunable import Filters
from ..weights.ranges import forget_arrays
from .binding import attached
from .foreign import release_optimizers, watch_optimizers
from .health import Health
from .hooks import Handlers, OptimizerHooks
from .late import LateWeights
from .loss_scale import watch_scalers
from .no_grad import no_grad
from .state_dict import StateDicts
from .step import OneOptimizer, Step
from .step_in_backward import half_done, in_backward
from .training import Training
from .wrappers import levels_of


class Attachment:
    """Calls a step at the steps of its optimizers, and adds its state to their state dicts.

    Args:
        training: the weights and the method on them.
        health: the checks after a step.
        states: reads and writes state dicts.
        filters: include and exclude, for parameters that are added to an optimizer later.

    Attributes:
        step: the step.
        is_open: whether it has not been released.

    Example:
        >>> import torch
        >>> from torch_feather import sparsify
        >>> model = torch.nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> attachment = sparsify(model, optimizer, sparsity=0.9, total_steps=2).attachment
        >>> attachment.release()
        >>> optimizer.step()  # an ordinary step
        >>> attachment.is_open
        False
    """

    def __init__(
        self,
        training: Training,
        health: Health,
        states: StateDicts,
        filters: tuple[Filters, Filters],
    ):
        late = LateWeights(training.model, training.binding, filters)
        self.step = step = Step(training, health, late, states.total_steps)
        self._health, self._states, self.is_open = health, states, True
        if training.method.facts.completes and len(step.optimizers) > 1:
            watch_scalers()
        self._hooks = [
            OptimizerHooks(levels_of(one.optimizer), self._handlers(one)) for one in step.optimizers
        ]
        self._things = [level for hooks in self._hooks for level in hooks.levels]
        for thing in (*self._things, *training.binding.parameters):
            attached[thing] = weakref.ref(step)
        watch_optimizers()

    def _handlers(self, one: OneOptimizer) -> Handlers:
        return Handlers(
            before=partial(self.step.before, one),
            ready=partial(self.step.ready, one),
            after=partial(self.step.after, one),
            closure=partial(self.step.inside_closure, one),
            failed=partial(self.step.failed, one),
            save=partial(self._save, one),
            load=partial(self._load, one),
            entries=partial(self._entries, one),
        )

    def sync(self) -> None:
        """Outside of a step: let latent and effective weights follow external writes.

        Raises:
            StateError: a step inside the backward pass is incomplete.
        """
        training = self.step.training
        if training.in_backward.is_open:
            if in_backward():
                raise half_done()
            self.step.raise_incomplete()
        in_step = any(one.holds_latent for one in self.step.optimizers)
        if self.is_open and not in_step and training.absorb_external_writes():
            training.write_effective()

    def release(self) -> None:
        """Remove all hooks from optimizers and parameters."""
        self.is_open = False
        training = self.step.training
        training.release()
        forget_arrays(training.weights)
        for hooks in self._hooks:
            hooks.release()
        for thing in (*self._things, *training.binding.parameters):
            attached.pop(thing, None)
        self._things.clear()
        release_optimizers()

    def require_open(self) -> None:
        """Raise StateError after `release`."""
        if not self.is_open:
            raise StateError(
                "This sparsifier was finalized or detached. Call sparsify again for a new one."
            )

    def require_between_steps(self) -> None:
        """Raise StateError after `release`, or within a step of an optimizer."""
        self.require_open()
        if any(hooks.stepping for hooks in self._hooks):
            raise StateError(
                "Within optimizer.step the parameters hold latent weights, so sparse training "
                "cannot end there: not in a closure, nor in a step hook that was registered before "
                "sparsify was called. Call finalize() or detach() after the step."
            )

    # State dicts

    def _save(self, one: OneOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.sync()
        return self._states.save(self.step.training, one.optimizer, one.held, state_dict)

    @no_grad
    def _entries(self, one: OneOptimizer) -> dict[Tensor, dict[str, Tensor]]:
        """Return the entries that a copy of an optimizer takes along."""
        self.sync()
        return self._states.live(self.step.training, one.optimizer, one.held)

    def _load(
        self, one: OneOptimizer, load_state_dict: Callable[..., Any], state_dict: dict[str, Any]
    ) -> Any:
        training = self.step.training
        plain, entries = self._states.read(training, one.held, state_dict)
        result = load_state_dict(plain)
        self._states.load(training, entries, one.held)
        self._health.resume_at(int(training.count))
        return result

    def adopt_loaded_state(self) -> None:
        """Load latent weights that were loaded into the optimizers before `sparsify`.

        Raises:
            StateError: the state belongs to another run.
        """
        training = self.step.training
        for one in self.step.optimizers:
            if self._states.adopt(training, one.optimizer, one.held):
                self._health.resume_at(int(training.count))
