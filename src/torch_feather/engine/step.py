"""One optimizer step of sparse training, composed of the pieces of this package.

    forward, backward         parameters hold u = R(w); dL/du becomes dL/dw for each new gradient
    optimizer.step, before    gradients are completed; parameters become w
    optimizer.step            any optimizer updates w
    optimizer.step, after     the schedule advances; thresholds move; parameters become u = R(w)

The pieces take values and return values, and never call back. Only this file composes them;
`attachment.py` calls it at the steps of the optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from torch.optim import Optimizer

from .. import devices
from ..errors import some
from ..weights.latent import copy_all
from .averages import warn_of_averages
from .first_step import check_not_replaced, several_processes
from .health import Health
from .hooks import only_initializes
from .late import LateWeights
from .no_grad import no_grad
from .step_in_backward import check_supported, in_backward, incomplete
from .training import Training
from .turns import Turns


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
        forward_values: values of its parameters in the forward pass, during a step inside the
            backward pass.

    Example:
        >>> import torch
        >>> from torch_feather import sparsify
        >>> model = torch.nn.Linear(10, 10)
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
    forward_values: list[Tensor] = field(default_factory=list)


class Step:
    """Composes weights, method and checks into the step of one or several optimizers.

    Args:
        training: the weights and the method on them.
        health: the checks after a step.
        late: notices weights that begin to train later.
        total_steps: optimizer steps of the whole training.

    Attributes:
        training: the weights and the method on them.
        optimizers: the optimizers; the schedule advances when the last one has stepped.
        turns: how often each of them has stepped.

    Example:
        >>> import torch
        >>> from torch_feather import sparsify
        >>> model = torch.nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = sparsify(model, optimizer, sparsity=0.9, total_steps=2).step
        >>> optimizer.step()  # calls step.before and step.after
        >>> int(step.training.count)
        1
    """

    def __init__(self, training: Training, health: Health, late: LateWeights, total_steps: int):
        self.training, self._health, self._late = training, health, late
        self._stepped, self._warned_of_averages = False, False
        binding = training.binding
        last = len(binding.optimizers) - 1
        self.optimizers = [
            OneOptimizer(o, one, binding.held_by(o), o == last)
            for o, one in enumerate(binding.optimizers)
        ]
        names = [type(one.optimizer).__name__ for one in self.optimizers]
        self.turns = Turns(names, [bool(one.held) for one in self.optimizers], total_steps)
        training.write_effective()

    @no_grad
    def before(self, one: OneOptimizer, closure: bool, ready: bool = True) -> None:
        """Before a step of an optimizer: complete gradients; its parameters become w.

        Args:
            one: the optimizer.
            closure: whether the step has a closure, which computes the gradients later.
            ready: whether the gradients are ready; a wrapper may change them first.
        """
        self._check(one)
        one.initializes = only_initializes(one.optimizer)
        one.in_backward = self.training.in_backward.is_open or in_backward()
        if one.in_backward:
            self._before_in_backward(one, closure)
            return
        if one.initializes:
            self._settle(one)
        self._check_sparse_start()
        absorbed = ready and not closure and self.training.complete_gradients(one.optimizer)
        self._write_latent(one, check=not absorbed)

    @no_grad
    def ready(self, one: OneOptimizer) -> None:
        """Within a step of a wrapper: complete its gradients, with effective weights."""
        if self.training.method.facts.completes and one.holds_latent:
            with self.inside_closure(one):
                pass

    @contextmanager
    def inside_closure(self, one: OneOptimizer) -> Iterator[None]:
        """Around a closure: the network uses effective weights."""
        self._read_latent(one)
        self.training.write_effective()
        try:
            yield
            self.training.complete_gradients(one.optimizer)
            self._settle(one)
        finally:
            self._write_latent(one)

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
        # A fused optimizer under GradScaler decides on the device whether it steps.
        skipped = getattr(one.optimizer, "found_inf", None)
        taken = taken and not one.initializes
        counts = taken if skipped is None else (skipped == 0) & taken
        self._read_latent(one, counts)
        self.turns.add(one.number, taken)
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
        self._health.check(
            training.weights, training.binding.local, training.method, training.pruning,
            training.count, training.written.nonfinite,
        )  # fmt: skip

    def failed(self, one: OneOptimizer) -> None:
        """After a step that raised: parameters become u again."""
        if one.holds_latent:
            self._read_latent(one)
        self.training.recover()

    def _write_latent(self, one: OneOptimizer, check: bool = False) -> None:
        self.training.write_latent(one.held, check)
        one.holds_latent = True

    def _read_latent(self, one: OneOptimizer, taken: bool | Tensor = False) -> None:
        self.training.read_latent(one.held, taken)
        one.holds_latent = False

    def _settle(self, one: OneOptimizer) -> None:
        """Record that the gradients of an optimizer are dL/dw."""
        if self.training.changes_gradients:
            self.training.assigned.settle(one.held, self.training.binding.parameters)

    # Optimizers that step inside the backward pass

    def _before_in_backward(self, one: OneOptimizer, closure: bool) -> None:
        if not one.held:
            return
        scaled = getattr(one.optimizer, "found_inf", None) is not None
        check_supported(self.training.method.facts, self.training.model, closure or scaled)
        if self.training.in_backward.has(one.number):
            self.raise_incomplete()
        self.training.absorb_external_writes()
        held = self.training.binding.local
        one.forward_values = [held[i].detach().clone() for i in one.held]
        self._write_latent(one)

    def _after_in_backward(self, one: OneOptimizer) -> None:
        if not one.held:
            return
        self._read_latent(one, taken=True)
        held = self.training.binding.local
        copy_all([held[i] for i in one.held], one.forward_values)
        one.forward_values = []
        if self.training.in_backward.add(one.number):
            self._advance(True)

    def raise_incomplete(self) -> None:
        """End the open step inside a backward pass that is over, and raise StateError."""
        missing = self.training.in_backward.missing()
        self.training.recover()
        weights = self.training.binding.weights
        raise incomplete(some([w.name for w in weights if w.optimizer in missing]))

    # Checks of changes by other code

    def _check(self, one: OneOptimizer) -> None:
        """Warn of weights that begin to train; raise for a step beyond the last one."""
        self._late.warn(one.optimizer)
        several = len(self.optimizers) > 1 and one.last
        if several and not devices.is_capturing(self.training.weights.device):
            self.turns.check(self.training.count)

    def _check_sparse_start(self) -> None:
        """Raise if effective weights of another process replaced the local ones before step 1."""
        training, weights = self.training, self.training.weights
        if self._stepped or weights.shards is not None or not several_processes():
            return
        if not devices.is_capturing(weights.device):
            every = range(len(weights.views))
            pruned = [training.method.pruned(weights, training.pruning, i) for i in every]
            check_not_replaced(pruned, training.binding.parameters)

    def warn_of_averages(self) -> None:
        """Warn once if another library averages the model, which would be dense."""
        if not self._warned_of_averages:
            self._warned_of_averages = warn_of_averages(self.training.binding.parameters)
