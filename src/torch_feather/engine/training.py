"""The state of a training run between steps, and the exchange of latent and effective weights.

`step.py` composes it with the hooks of the optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import devices
from ..methods.base import BoundMethod, Completion, Gradients, Pruning, effective_weights
from ..weights.exchange import read_latent, write_latent
from ..weights.latent import LatentWeights, copy_all
from ..weights.passes import adopt_written
from ..weights.sums import Recorded
from .assigned_gradients import AssignedGradients
from .binding import Binding
from .external_writes import WriteDetector
from .fixed_memory import keep_memory, store
from .gradients import (
    PassGradients,
    PendingGradients,
    add_terms,
    clear_own_gradients,
    hook_for,
    register_hooks,
    set_own_gradients,
)
from .loss_scale import unscale_others
from .moved import move_latent, move_state
from .no_grad import no_grad
from .sharding import check_shards, require_shards_supported
from .step_in_backward import InBackwardStep
from .storage import check_storage, layouts


class Training:
    """The weights of a training run, and the method on them.

    Attributes:
        model: the model.
        binding: the prunable weights in the model and the optimizers.
        weights: the latent weights.
        method: the method, bound to them.
        pruning: its thresholds or masks now.
        count: optimizer steps taken, a 0-dimensional tensor on the device.
        written: detects external writes.
        pending: gradients that are not completed.
        assigned: finds gradients that no tensor hook saw.
        in_backward: optimizers that step inside the backward pass.

    Example:
        >>> from torch_feather import sparsify
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> training = sparsify(model, optimizer, sparsity=0.9, total_steps=8).step.training
        >>> training.write_latent([0])  # as before a step
        >>> training.read_latent([0])  # as after a step
        >>> training.write_effective()
        >>> training.weights.size, int(training.count)
        (100, 0)
    """

    def __init__(
        self, model: nn.Module, binding: Binding, weights: LatentWeights, method: BoundMethod
    ):
        self.model, self.binding, self.weights, self.method = model, binding, weights, method
        require_shards_supported(method, weights)
        # On the device: only there a skipped step is known, and reading it would synchronize.
        self.count = torch.zeros((), dtype=torch.int64, device=weights.device)
        self.pruning: Pruning = None
        self.pending, self.written = PendingGradients(), WriteDetector()
        self.assigned = AssignedGradients(binding.names)
        self.in_backward = InBackwardStep([weight.optimizer for weight in binding.weights])
        self._passes: PassGradients | None = None
        self._layouts = layouts(binding.parameters)
        self._left: dict[int, int] = {}  # parameters that hold latent weights, and their versions
        self._gradient_hooks: list[Any] = []
        self._hook_gradients()

    # The exchange of values

    @no_grad
    def write_effective(self) -> None:
        """Update thresholds or masks; parameters become u = R(w)."""
        new = store(self.method, self.method.update(self.weights, self.count))
        self.pruning = keep_memory(self.pruning, new, self.weights.device)
        self._write()

    def _write(self) -> None:
        """Write u into the parameters, and record it for the detection of external writes."""
        held = Recorded(self.binding.local)
        self.method.write_effective(self.weights, self.pruning, held)
        self.written.record(self.weights, held)

    @no_grad
    def write(self, values: Sequence[Tensor]) -> None:
        """Write values into the parameters, and record them for the detection of external writes.

        Args:
            values: one local tensor per weight tensor.
        """
        held = Recorded(self.binding.local)
        copy_all(held, values)
        self.written.record(self.weights, held)

    @no_grad
    def advance(self, taken: bool | Tensor) -> None:
        """Advance the schedule and step the method's own parameters, if the step was taken.

        Args:
            taken: whether the step was taken; a tensor if only the device knows.
        """
        method, binding = self.method, self.binding
        self.count += taken
        if taken is False:
            return
        if method.facts.random is not None:
            method.state[method.facts.random].flat.add_(taken)
        gradients, lr = binding.gradients, binding.learning_rate()
        method.after_step(self.weights, self.pruning, gradients, self.count, lr, taken)
        self.forget_own_gradients()
        if method.facts.completes:
            self.pending.consume(binding.parameters)

    @no_grad
    def recover(self) -> None:
        """Let parameters become u again after a failure.

        The failure may concern this process alone, so nothing is communicated. On shards, the
        thresholds stay unchanged until the next check of all processes.
        """
        self.in_backward.abandon()
        if self.weights.shards is None:
            self.write_effective()
            return
        self._write()
        self.written.invalidate()

    @no_grad
    def write_latent(self, positions: Sequence[int], check: bool = False) -> None:
        """Write latent weights into the parameters at these positions.

        Args:
            positions: positions of the weight tensors.
            check: adopt external writes first. On a CPU, both are one pass.
        """
        sums = None
        if check:
            self.follow_parameters()
            sums = self.written.sums(self.weights)
            if sums is None:
                self.absorb_external_writes()
        held = self.binding.local
        left, self._left = self._left, {}
        positions = [i for i in positions if left.get(i) != held[i]._version]
        suspects = write_latent(self.weights, positions, held, sums)
        if suspects:
            self._adopt(suspects)
            write_latent(self.weights, positions, held)

    @no_grad
    def read_latent(self, positions: Sequence[int], taken: bool | Tensor = False) -> None:
        """Read latent weights from the parameters at these positions.

        Args:
            positions: positions of the weight tensors.
            taken: whether their optimizer took a step, after which the method may update them.
        """
        held, update = self.binding.local, self.method.latent_update
        pending = None if update is None or taken is False else self.binding.pending(update, taken)
        read_latent(self.weights, positions, [held[i] for i in positions], pending)

    # Gradients

    def _hook_gradients(self) -> None:
        """Register a hook on every weight, unless the method leaves gradients unchanged."""
        for handle in self._gradient_hooks:
            handle.remove()
        facts = self.method.facts
        leaves = self.binding.leaves(self.model) if facts.pulls_back or facts.completes else ()
        self._gradient_hooks = register_hooks(leaves, self._pull_back)

    @property
    def changes_gradients(self) -> bool:
        """Whether the method needs hooks on gradients."""
        return bool(self._gradient_hooks)

    def _pull_back(self, i: int, gradient: Tensor, effective: Tensor) -> Tensor:
        """Record a new gradient dL/du of weight tensor i, and return its dL/dw."""
        self.assigned.hooked(i)
        if self.pending.report():
            self.forget_own_gradients()
        return self.method.pull_back(self.weights, self.pruning, i, gradient, effective)

    def forget_own_gradients(self) -> None:
        """Set the gradients of the method's own parameters to None."""
        clear_own_gradients(self.method)
        self._passes = None

    @no_grad
    def complete_gradients(self, stepping: Optimizer | None = None) -> bool:
        """Take assigned gradients back to the latent weights, and complete new gradients; once.

        Args:
            stepping: the optimizer that steps next; None outside of a step.

        Returns:
            Whether external writes were absorbed. Nothing writes parameters after that.
        """
        completes = self.method.facts.completes
        if completes:
            self.follow_parameters()  # gradients may belong to parameters that were replaced
        if self._passes is None:  # otherwise each pass converts its own
            self._convert_assigned(None if completes else stepping)
        if not completes or not self.pending.are_due(self.binding.parameters):
            return False
        scale = None
        if stepping is not None:
            numbers = {weight.optimizer for weight in self.binding.weights}
            others = [self.binding.optimizers[number] for number in numbers]
            unscale_others(stepping, [one for one in others if one is not stepping])
            # A fused optimizer under GradScaler divides by the scale itself.
            scale = getattr(stepping, "grad_scale", None)
        gradients = self.binding.gradients
        if self._passes is not None:
            self.absorb_external_writes()
            self.end_pass()  # if the last pass has not ended yet
            own = self._passes.at_step(gradients, scale)
        else:
            self.pending.warn_of_one_pass(self.method.facts.passes)
            held = [] if stepping is None else self._held_by(stepping)
            completion = self._completion(gradients, scale, held)
            add_terms(gradients, completion)
            own = dict(completion.own)
        set_own_gradients(self.method, own)
        self.pending.complete()
        return True

    def _held_by(self, optimizer: Optimizer) -> list[int]:
        return self.binding.held_by(self.binding.optimizers.index(optimizer))

    def _convert_assigned(self, stepping: Optimizer | None = None) -> None:
        """Turn gradients that no hook saw into dL/dw, those of one optimizer or all."""
        if not self.changes_gradients:
            return
        binding, every = self.binding, range(len(self.binding.weights))
        held = every if stepping is None else self._held_by(stepping)
        if self.assigned.find(held, binding.current()):
            self.follow_parameters()
            found = self.assigned.find(held, binding.parameters)
            later_pass = self._passes is not None
            self.assigned.convert(found, binding.parameters, self._pull_back, later_pass)

    def _completion(
        self, gradients: Gradients, scale: Tensor | None, leaving: Sequence[int] | None = None
    ) -> Completion:
        """Return the completion of the gradients; with `leaving`, absorb external writes.

        On a CPU, `complete` may sum the effective weights and let latent weights take their place
        at these positions. So writes are detected after it; if there are any, it is called again.
        """
        if leaving is not None and devices.synchronizes(self.weights.device):
            self.absorb_external_writes()
            leaving = None
        effective = [held.detach() for held in self.binding.local]
        if leaving is None:
            return self.method.complete(self.weights, self.pruning, gradients, effective, scale)
        read = self.written.reading(self.weights, effective, leaving)
        found = self.method.complete(self.weights, self.pruning, gradients, read, scale)
        if self.absorb_external_writes(read):
            return self._completion(gradients, scale)
        self._left = read.finish()
        return found

    @no_grad
    def begin_pass(self, number: int) -> None:
        """Begin one of several passes of a step, with its own random numbers.

        Args:
            number: number of the pass in its step, from 0.
        """
        if number == 0:
            self.forget_own_gradients()
            return
        self.absorb_external_writes()
        name = self.method.facts.random
        if name is None:
            return
        self.assigned.settle(range(len(self.weights.views)), self.binding.parameters)
        self.method.state[name].flat.add_(1)
        self.write_effective()
        if self._passes is not None:
            self._passes.begin(self._completion(self.binding.gradients, None))

    @no_grad
    def end_pass(self) -> None:
        """End one of several passes of a step."""
        ended = self._passes is not None and self._passes.complete
        if self.method.facts.random is None or ended:
            return
        self._convert_assigned()
        if not self.pending.are_due(self.binding.parameters):
            return  # the step was taken inside the pass
        if self._passes is None:
            self._passes = PassGradients()
        gradients = self.binding.gradients
        self._passes.end(gradients, self._completion(gradients, None))

    # Changes of parameters by other code

    @no_grad
    def absorb_external_writes(self, read: Recorded | None = None) -> bool:
        """Adopt external writes as latent weights; return whether there may have been any.

        Args:
            read: the parameters after a pass that read them.
        """
        if self.in_backward.is_open:
            return False  # parameters hold the values of the forward pass
        if read is None:
            self.follow_parameters()
        suspects = self.written.suspects(self.weights, read or self.binding.local)
        if suspects:
            self._adopt(suspects, read)
        return bool(suspects)

    def _adopt(self, suspects: Sequence[int], read: Recorded | None = None) -> None:
        """Adopt values of parameters that are not effective weights as latent weights."""
        effective = effective_weights(self.method, self.weights, self.pruning)
        if read is not None:
            read.restore(effective)
        adopt_written(self.weights, suspects, self.binding.local, effective)

    @no_grad
    def is_unmodified(self) -> bool:
        """Return whether it is known that the parameters hold the effective weights.

        On shards, and on accelerators without a comparison of all weights, it is not.

        Raises:
            StateError: the optimizers hold parameters that the model does not.
        """
        if self.in_backward.is_open or self.weights.shards is not None:
            return False
        current = self.binding.current()
        self.binding.check_held(self.model, current)
        if not all(map(is_, self.binding.parameters, current)):
            return False
        if layouts(current) != self._layouts:
            return False
        return not self.written.suspects(self.weights, self.binding.local)

    @no_grad
    def follow_parameters(self) -> None:
        """Follow parameters that were replaced, moved or cast since the last check.

        Raises:
            ConfigurationError: their new storage is not supported.
            StateError: the optimizers hold parameters that the model does not, or the shards
                changed.
        """
        current = self.binding.current()
        self.binding.check_held(self.model, current)
        found = layouts(current)
        if all(map(is_, self.binding.parameters, current)) and found == self._layouts:
            return
        before = self.weights
        effective = effective_weights(self.method, before, self.pruning)
        check_storage(self.binding.names, current)
        check_shards(before, current)
        for i, (weight, parameter) in enumerate(zip(self.binding.weights, current, strict=True)):
            replaced, weight.parameter = weight.parameter is not parameter, parameter
            if replaced and parameter.grad is not None and self._gradient_hooks:
                # The gradient was computed without the hook.
                parameter.grad = hook_for(i, parameter, self._pull_back)(parameter.grad)
        self.weights, self._layouts = LatentWeights(current), found
        require_shards_supported(self.method, self.weights)
        move_latent(before, effective, self.weights, current)
        self.forget_own_gradients()
        move_state(self.method, self.weights)
        self.count = self.count.to(self.weights.device)
        self.continue_with(self.method)

    def continue_with(self, method: BoundMethod) -> None:
        """Use a method, bound to the present weights, from now on."""
        self.method, self.pruning = method, None
        self._hook_gradients()
        self.write_effective()

    def release(self) -> None:
        """Remove the hooks on gradients."""
        for handle in self._gradient_hooks:
            handle.remove()
