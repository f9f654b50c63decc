"""From dL/du to dL/dw: gradient hooks, completion, and several passes per step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ConfigurationError, warn
from ..methods.base import BoundMethod, Completion, Gradients
from ..weights.latent import PerTensor
from ..weights.shards import local, local_part, shard_like


class PendingGradients:
    """Tracks gradients that `complete` has not processed.

    Tensor hooks report autograd gradients; gradients assigned to `.grad` are detected by tensor
    identity and version. Each gradient is completed once.

    Example:
        >>> w, pending = torch.ones(2), PendingGradients()
        >>> w.grad = torch.ones(2)
        >>> pending.are_due([w])
        True
        >>> pending.consume([w])
        >>> pending.are_due([w])
        False
    """

    def __init__(self) -> None:
        self._reported = False
        self._completed = False
        self._warned_of_passes = False
        self._consumed = WeakIdKeyDictionary()  # gradients of the last step, and their versions

    def report(self) -> bool:
        """Record a new gradient; return whether it invalidates a completion."""
        invalid, self._reported, self._completed = self._completed, True, False
        return invalid

    def complete(self) -> None:
        """Record that all gradients are completed."""
        self._reported, self._completed = False, True

    def consume(self, parameters: Iterable[Tensor]) -> None:
        """Record a step; a further step on the same gradients completes nothing."""
        self._consumed = WeakIdKeyDictionary()
        for gradient in _gradients(parameters):
            self._consumed[gradient] = gradient._version
        self._reported = self._completed = False

    def warn_of_one_pass(self, passes: int) -> None:
        """Warn once if a step took one pass, but several were requested."""
        if passes > 1 and not self._warned_of_passes:
            self._warned_of_passes = True
            warn(
                f"The option passes={passes} is set, but this step took one pass. Run forward and "
                "backward pass in `for fraction in sparsifier.passes():`."
            )

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
    """Return a tensor hook that turns dL/du into dL/dw.

    Args:
        i: position of the weight tensor.
        holder: the tensor that holds u.
        pull_back: computes dL/dw of local shards.

    Example:
        >>> hook = hook_for(0, torch.ones(2), lambda i, gradient, u: gradient * u)
        >>> hook(torch.tensor([2.0, 3.0]))
        tensor([2., 3.])
    """

    def hook(gradient: Tensor) -> Tensor:
        part, effective = local_part(gradient, holder), local(holder).detach()
        return shard_like(pull_back(i, part, effective), holder)

    return hook


def check_passes(count: Any) -> int:
    """Return a number of passes of one step; raise ConfigurationError if it is none.

    Example:
        >>> check_passes(2)
        2
    """
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise ConfigurationError(f"count must be an integer >= 1, got {count!r:.80}.")
    return int(count)


def register_hooks(leaves: Iterable[tuple[int, Tensor]], pull_back: PullBack) -> list[Any]:
    """Register a hook on every leaf; return the handles.

    Args:
        leaves: position of each weight tensor, and the tensor that holds u.
        pull_back: computes dL/dw of local shards.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> handles = register_hooks([(0, w)], lambda i, gradient, u: gradient / 2)
        >>> w.sum().backward()
        >>> w.grad
        tensor([0.5000, 0.5000])
    """
    handles = []
    for i, holder in leaves:
        # A layer that is frozen now needs its hook when it is trained again.
        trains = holder.requires_grad
        holder.requires_grad_(True)
        handles.append(holder.register_hook(hook_for(i, holder, pull_back)))
        holder.requires_grad_(trains)
    return handles


def add_terms(gradients: Gradients, completion: Completion) -> None:
    """Add the cross terms of a completion to the gradients, in place.

    Args:
        gradients: dL/dw of each tensor, or None; written to.
        completion: its `terms` have the same shapes; each is multiplied by its factor, if any.

    Example:
        >>> gradient = torch.ones(2)
        >>> add_terms([gradient], Completion(terms=[torch.ones(2)]))
        >>> add_terms([gradient], Completion([torch.ones(2)], factors=[torch.tensor(3.0)]))
        >>> gradient
        tensor([5., 5.])
    """
    factors = completion.factors or itertools.repeat(None)
    for gradient, term, factor in zip(gradients, completion.terms or (), factors, strict=False):
        if gradient is None or term is None:
            continue
        if factor is None:
            gradient += term
        else:
            gradient.addcmul_(term, factor)


def own_parameters(method: BoundMethod) -> list[Tensor]:
    """Return the parameters of the method itself, one per entry or one per weight tensor.

    Args:
        method: the method; `facts.learned` names the entries of its state.

    Example:
        >>> from types import SimpleNamespace
        >>> from torch_feather.methods.base import Facts
        >>> entry = PerTensor.of(torch.zeros(1))
        >>> method = SimpleNamespace(facts=Facts(learned=("r",)), state={"r": entry})
        >>> own_parameters(method)
        [tensor([0.])]
    """
    found: list[Tensor] = []
    for name in method.facts.learned:
        entry = method.state[name]
        found += entry.rows if entry.per_weight else [entry.flat]
    return found


def set_own_gradients(method: BoundMethod, own: dict[str, PerTensor]) -> None:
    """Set `.grad` of the method's own parameters.

    Args:
        method: the method.
        own: gradients by name of the learned entry.

    Example:
        >>> from types import SimpleNamespace
        >>> from torch_feather.methods.base import Facts
        >>> entry = PerTensor.of(torch.zeros(1))
        >>> method = SimpleNamespace(facts=Facts(learned=("r",)), state={"r": entry})
        >>> set_own_gradients(method, {"r": PerTensor.of(torch.ones(1))})
        >>> own_parameters(method)[0].grad
        tensor([1.])
    """
    for name, gradient in own.items():
        entry = method.state[name]
        if entry.per_weight:
            for parameter, row in zip(entry.rows, gradient.rows, strict=True):
                parameter.grad = row
        else:
            entry.flat.grad = gradient.flat


def clear_own_gradients(method: BoundMethod) -> None:
    """Set `.grad` of the method's own parameters to None.

    Args:
        method: the method, bound to the weights.

    Example:
        >>> from types import SimpleNamespace
        >>> from torch_feather.methods.base import Facts
        >>> entry = PerTensor.of(torch.zeros(1))
        >>> method = SimpleNamespace(facts=Facts(learned=("r",)), state={"r": entry})
        >>> set_own_gradients(method, {"r": PerTensor.of(torch.ones(1))})
        >>> clear_own_gradients(method)
        >>> own_parameters(method)[0].grad is None
        True
    """
    for parameter in own_parameters(method):
        parameter.grad = None


class PassGradients:
    """Gradients of own parameters over several forward and backward passes of one step.

    Each pass has its own random numbers, and gradients accumulate. `complete` is linear in them. So
    a pass contributes the completion at its end, minus that of the gradients before it.

    Example:
        >>> passes, gradients = PassGradients(), [torch.ones(2)]
        >>> passes.end(gradients, Completion(own={"r": PerTensor.of(torch.ones(1))}))
        >>> passes.at_step(gradients, scale=torch.tensor(2.0))["r"].flat
        tensor([0.5000])
    """

    def __init__(self) -> None:
        self.own: dict[str, PerTensor] = {}
        self._size: Tensor | None = None

    def begin(self, completion: Completion) -> None:
        """Begin a pass.

        Args:
            completion: completion of the gradients of earlier passes, with the random numbers of
                this pass. It is subtracted.
        """
        for name, new in completion.own.items():
            self.own[name].flat.sub_(new.flat)
        self._size = None

    def end(self, gradients: Gradients, completion: Completion) -> None:
        """End a pass.

        Args:
            gradients: all gradients so far.
            completion: their completion, with the random numbers of this pass. It is added.
        """
        if completion.terms is not None:
            raise TypeError("complete() of a method with random numbers must return terms=None.")
        for name, new in completion.own.items():
            if name in self.own:
                self.own[name].flat.add_(new.flat)
            else:
                self.own[name] = new
        self._size = _total_size(gradients)

    def at_step(self, gradients: Gradients, scale: Tensor | None) -> dict[str, PerTensor]:
        """Return the sums at the present scale of the gradients.

        `GradScaler.unscale_` may have divided the gradients since the last pass.

        Args:
            gradients: all gradients.
            scale: loss scale that they still contain; None for 1.
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
