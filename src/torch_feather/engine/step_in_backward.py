"""Optimizers that step inside the backward pass, each as soon as it has its gradients.

A common threshold needs all weights. So the steps of one backward pass form one step, which ends
when every optimizer with prunable weights has stepped, in any order. Only then the schedule
advances and the parameters become R(w). Until then they keep the values of the forward pass: the
backward pass of other layers may still read them, as with activation checkpointing. The trajectory
equals that of a loop that steps after the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import StateError
from ..methods.base import Facts


def in_backward() -> bool:
    """Return whether this thread is inside a backward pass.

    Example:
        >>> in_backward()
        False
    """
    return torch._C._current_graph_task_id() != -1


class InBackwardStep:
    """Tracks which optimizers have stepped in this backward pass.

    Args:
        holders: number of the optimizer that holds each prunable weight.

    Example:
        >>> step = InBackwardStep([0, 1])
        >>> step.add(0), step.is_open, step.add(1), step.is_open
        (False, True, True, False)
    """

    def __init__(self, holders: Sequence[int]):
        self._holders = frozenset(holders)
        self._stepped: set[int] = set()

    @property
    def is_open(self) -> bool:
        """Whether some optimizers have stepped and others have not."""
        return bool(self._stepped)

    def add(self, optimizer: int) -> bool:
        """Record a step; return whether it was the last one, which ends the step."""
        self._stepped.add(optimizer)
        if self._stepped != self._holders:
            return False
        self._stepped.clear()
        return True

    def abandon(self) -> None:
        """End the step although some optimizers have not stepped."""
        self._stepped.clear()

    def has(self, optimizer: int) -> bool:
        """Return whether this optimizer has stepped."""
        return optimizer in self._stepped

    def missing(self) -> frozenset[int]:
        """Return the optimizers that have not stepped."""
        return self._holders - self._stepped


def check_supported(facts: Facts, model: nn.Module, closure_or_scaler: bool) -> None:
    """Raise StateError for an optimizer that cannot step inside the backward pass.

    Args:
        facts: those of the method.
        model: the model.
        closure_or_scaler: whether the step has a closure, or a `GradScaler` takes it.

    Example:
        >>> check_supported(Facts(), nn.Linear(2, 2), False)
    """
    fix = "Step after the backward pass: this optimizer steps inside it, and "
    if facts.completes:
        raise StateError(fix + "the method needs the gradients of all weights at once.")
    if closure_or_scaler:
        raise StateError(fix + "neither closures nor GradScaler are supported there.")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise StateError(fix + "DistributedDataParallel has not averaged the gradients yet.")


def half_done() -> StateError:
    """Return the error for reading the model while a step inside the backward pass is open.

    Example:
        >>> str(half_done())[:43]
        'Some optimizers have stepped in this backwa'
    """
    return StateError(
        "Some optimizers have stepped in this backward pass and others have not, so the model is "
        "between two steps. Read or save it after the backward pass."
    )


def incomplete(names: str) -> StateError:
    """Return the error for a backward pass that left a step open.

    Args:
        names: names of the weights whose optimizers did not step, as text.

    Example:
        >>> "0.weight" in str(incomplete("0.weight"))
        True
    """
    return StateError(
        "All optimizers with prunable weights must step once per backward pass, but the optimizers "
        f"of {names} did not. The step was not counted; completed updates were kept. Exclude "
        "weights that do not always receive gradients (exclude=), or step after backward(). If "
        "backward() itself failed, no action is needed."
    )
