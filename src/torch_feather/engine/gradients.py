"""From dL/du to dL/dw: hooks, gradients that still have to be completed, and several passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..methods.base import BoundMethod, Completion, Gradients
from ..weights.latent import PerTensor
from ..weights.shards import local, local_part, shard_like


class PendingGradients:
    """Tracks gradients that `complete` has not processed.

    Tensor hooks report autograd gradients; gradients assigned to `.grad` are detected by tensor
    identity and version. Each gradient is completed once.
    """

    def __init__(self) -> None:
        self._reported = False
        self._completed = False
        self._consumed = WeakIdKeyDictionary()  # gradients of the last step, and their versions

    def report(self) -> bool:
        """Record a new gradient; return whether it invalidates a completion."""
        invalid, self._reported, self._completed = self._completed, True, False
        return invalid

    def complete(self) -> None:
        """Record that all gradients are completed."""
        self._reported, self._completed = False, True

    def consume(self, parameters: Iterable[Tensor]) -> None:
        """Record the step: another one on the same gradients has nothing to complete."""
        self._consumed = WeakIdKeyDictionary()
        for gradient in _gradients(parameters):
            self._consumed[gradient] = gradient._version
        self._reported = self._completed = False

    def are_due(self, parameters: Iterable[Tensor]) -> bool:
        """Return whether there are new gradients that are not completed."""
        if self._completed or self._reported:
            return self._reported
        return any(self._consumed.get(g) != g._version for g in _gradients(parameters))


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


PullBack = Callable[[int, Tensor, Tensor], Tensor]
"""Takes the position of a weight tensor, dL/du and u, local shards; returns dL/dw."""


def hook_for(i: int, holder: Tensor, pull_back: PullBack) -> Callable[[Tensor], Tensor]:
    """Return a tensor hook that takes the gradient of `holder`, which holds u, back to w."""

    def hook(gradient: Tensor) -> Tensor:
        part, effective = local_part(gradient, holder), local(holder).detach()
        return shard_like(pull_back(i, part, effective), holder)

    return hook


def register_hooks(leaves: Iterable[tuple[int, Tensor]], pull_back: PullBack) -> list[Any]:
    """Register a hook on every leaf; return the handles."""
    handles = []
    for i, holder in leaves:
        # A layer that is frozen for now has its hook when it is trained again.
        trains = holder.requires_grad
        holder.requires_grad_(True)
        handles.append(holder.register_hook(hook_for(i, holder, pull_back)))
        holder.requires_grad_(trains)
    return handles


def add_terms(gradients: Gradients, completion: Completion) -> None:
    """Add the cross terms of a completion to the gradients, in place."""
    for gradient, term in zip(gradients, completion.terms or (), strict=False):
        if gradient is not None and term is not None:
            gradient += term


def own_parameters(method: BoundMethod) -> list[Tensor]:
    """Return the parameters of the method itself, one per entry or one per weight tensor."""
    found: list[Tensor] = []
    for name in method.facts.learned:
        entry = method.state[name]
        found += entry.rows if entry.per_weight else [entry.flat]
    return found


def set_own_gradients(method: BoundMethod, own: dict[str, PerTensor]) -> None:
    """Set `.grad` of the method's own parameters."""
    for name, gradient in own.items():
        entry = method.state[name]
        if entry.per_weight:
            for parameter, row in zip(entry.rows, gradient.rows, strict=True):
                parameter.grad = row
        else:
            entry.flat.grad = gradient.flat


def clear_own_gradients(method: BoundMethod) -> None:
    """Set `.grad` of the method's own parameters to None."""
    for parameter in own_parameters(method):
        parameter.grad = None


class PassGradients:
    """Gradients of own parameters over several forward and backward passes of one step.

    Each pass has random numbers of its own, and gradients accumulate. `complete` is linear in them:
    the completion at the end of a pass counts, less that of the gradients before it.
    """

    def __init__(self) -> None:
        self.own: dict[str, PerTensor] = {}
        self._size: Tensor | None = None

    def begin(self, completion: Completion) -> None:
        """Subtract the completion of earlier passes' gradients with this pass's random numbers."""
        for name, new in completion.own.items():
            self.own[name].flat.sub_(new.flat)
        self._size = None

    def end(self, gradients: Gradients, completion: Completion) -> None:
        """Add the completion of all gradients so far with this pass's random numbers."""
        for name, new in completion.own.items():
            if name in self.own:
                self.own[name].flat.add_(new.flat)
            else:
                self.own[name] = new
        self._size = _total_size(gradients)

    def at_step(self, gradients: Gradients, scale: Tensor | None) -> dict[str, PerTensor]:
        """Return the sums at the scale that the gradients have now.

        The gradients may have been divided since, by `GradScaler.unscale_`.
        """
        assert self._size is not None
        now = _total_size(gradients)
        factor = torch.where(self._size > 0, now / self._size, 1.0)
        for entry in self.own.values():
            entry.flat.mul_(factor)
            if scale is not None:
                entry.flat.div_(scale)
            entry.flat.nan_to_num_(0.0, 0.0, 0.0)
        return self.own

    @property
    def complete(self) -> bool:
        """Whether the last pass has ended."""
        return self._size is not None


def _total_size(gradients: Sequence[Tensor | None]) -> Tensor:
    """Return the sum of |dL/dw|."""
    sizes = [g.abs().sum(dtype=torch.float64) for g in gradients if g is not None]
    return torch.stack(sizes).sum() if sizes else torch.zeros(())
