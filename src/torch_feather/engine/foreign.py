"""Notices optimizers that step weights of a sparsifier without belonging to it.

A training loop may replace its optimizer, or build one from a saved state without calling
`sparsify`. Such an optimizer would train all weights dense. It raises at its first step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import StateError, some
from .binding import attached
from .checkpoint import PREFIX
from .hooks import only_initializes
from .wrappers import levels_of


class _Watch:
    """Checks every optimizer of this process before its step, as long as there are sparsifiers."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._generation = 0
        self._harmless: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def begin(self) -> None:
        self._generation += 1  # weights were attached, so harmless optimizers are checked again
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._check)

    def end(self) -> None:
        if self._handle is not None and not attached:
            self._handle.remove()
            self._handle = None

    def _check(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or optimizer in attached:
            return
        _refuse_loaded(optimizer)
        known = self._generation, sum(len(group["params"]) for group in optimizer.param_groups)
        if self._harmless.get(optimizer) == known:
            return
        held = [p for group in optimizer.param_groups for p in group["params"] if p in attached]
        if not held:
            self._harmless[optimizer] = known
            return
        steps = [step for p in held if (step := attached[p]()) is not None]
        if any(one.holds_latent for step in steps for one in step.optimizers):
            return  # inside the step of an optimizer that owns this one
        if not only_initializes(optimizer):
            raise _foreign(optimizer, held, steps)


_watch = _Watch()


def watch_optimizers() -> None:
    """Begin to notice optimizers without a sparsifier; called for every new sparsifier.

    Example:
        >>> watch_optimizers()
        >>> torch.optim.SGD([torch.ones(2)], lr=0.1).step()  # holds no weights of a sparsifier
        >>> release_optimizers()
    """
    _watch.begin()


def release_optimizers() -> None:
    """Stop to notice optimizers if no weights are attached.

    Example:
        >>> release_optimizers()
    """
    _watch.end()


def _refuse_loaded(optimizer: Optimizer) -> None:
    """Raise StateError if the optimizer's state holds latent weights."""
    for own in getattr(optimizer, "state", {}).values():
        if isinstance(own, dict):
            if PREFIX + "header" in own:
                raise StateError(
                    f"The state of this {type(optimizer).__name__} was saved by a run with a "
                    "sparsifier, but it has none, so it would train all weights dense. Call "
                    "sparsify with the same arguments before the first step: training continues "
                    "from the loaded latent weights and step. To train dense, create a new "
                    "optimizer."
                )
            return  # saved entries are in the state of every trained parameter


def _foreign(optimizer: Optimizer, held: list[Any], steps: list[Any]) -> StateError:
    kind = type(optimizer).__name__
    if any(level in attached for level in levels_of(optimizer)):
        return StateError(
            f"{kind} wraps the optimizer that was passed to sparsify, and may read or write "
            f"parameters outside of its step, where they hold effective weights. Pass the {kind} "
            "to sparsify."
        )
    names = {
        id(weight.parameter): weight.name
        for step in steps
        for weight in step.training.binding.weights
    }
    found = [names[id(p)] for p in held if id(p) in names]
    weights = some(found) if found else f"{len(held)} weights"
    if not steps:
        return StateError(
            f"This {kind} would step {weights}, whose sparsifier was deleted with another "
            "optimizer, and would train the pruned ones, too. To start again from the effective "
            "weights, call sparsify with the new optimizer; to train dense, call detach() of what "
            "it returns. Before deleting an optimizer, call finalize(), or keep state_dict() of "
            "its sparsifier."
        )
    return StateError(
        f"This {kind} would step {weights}, whose sparsifier belongs to another "
        "optimizer, so it would train effective weights instead of latent ones. To replace the "
        "optimizer during training: state = sparsifier.state_dict(); sparsifier.detach(); create "
        "the optimizer; call sparsify again with the same arguments; "
        "sparsifier.load_state_dict(state)."
    )
