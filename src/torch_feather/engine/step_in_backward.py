"""Optimizers that step within the backward pass, each as soon as its gradients are there.

A common threshold needs all of them. So the steps of one backward pass are a round, which ends when
every optimizer with prunable weights has stepped, in whatever order: only then the schedule
advances, thresholds move and parameters become R(w). Until then parameters hold what they held in
the forward pass, since layers that are still to come may read them, recomputed ones too. The
trajectory is that of a loop that steps after the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import StateError


def in_backward() -> bool:
    """Whether this thread is within a backward pass."""
    return torch._C._current_graph_task_id() != -1


class Round:
    """Which optimizers have stepped in this backward pass.

    Args:
        holders: the number of the optimizer that holds each prunable weight.
    """

    def __init__(self, holders: Sequence[int]):
        self._holders = frozenset(holders)
        self._stepped: set[int] = set()

    @property
    def is_open(self) -> bool:
        """Whether some have stepped, and others not yet."""
        return bool(self._stepped)

    def add(self, optimizer: int) -> bool:
        """Notes a step; returns whether it was the last, and the round is over."""
        self._stepped.add(optimizer)
        if self._stepped != self._holders:
            return False
        self._stepped.clear()
        return True

    def abandon(self) -> None:
        """The round ends although some have not stepped."""
        self._stepped.clear()

    def has(self, optimizer: int) -> bool:
        """Whether this optimizer has stepped."""
        return optimizer in self._stepped

    def missing(self) -> frozenset[int]:
        """Those that have not stepped."""
        return self._holders - self._stepped


def half_done() -> StateError:
    """The error for a look at the whole while a round is open, within the backward pass."""
    return StateError(
        "Some optimizers have stepped in this backward pass, others not yet: what could be read or "
        "saved here is half of a step. Do it after the backward pass."
    )


def incomplete(names: str) -> StateError:
    """The error for a backward pass that left a round open; `names` are of weights."""
    return StateError(
        f"The optimizers of {names} did not step within the backward pass, others did. Such a step "
        "is whole when all optimizers with prunable weights have stepped once. Leave out weights "
        "without a gradient in every backward pass (exclude=), or step after it; where the pass "
        "itself raised an error, go on. This step did not count; the updates that were made are "
        "kept."
    )
