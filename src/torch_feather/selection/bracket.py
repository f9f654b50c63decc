"""A bracket around the next threshold, from the last one."""

from __future__ import annotations

import math
from dataclasses import dataclass

WIDEST = 0.05
"""Largest half-width, relative to the threshold; beyond it, a sample finds a narrower bracket."""
NARROWEST = 1e-4


@dataclass
class Bracket:
    """Where the next k-th score is expected: near the last one.

    It only decides how fast a selection is, never its result, so it is not part of a state.

    Attributes:
        value: the last k-th score; None before the first selection.
        width: half-width of the bracket, relative to `value`.

    Example:
        >>> bracket = Bracket()
        >>> bracket.update(2.0)
        >>> bracket.bounds
        (1.98, 2.02)
    """

    value: float | None = None
    width: float = 0.01

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The bounds; None if nothing is known."""
        if self.value is None:
            return None
        return self.value * (1 - self.width), self.value * (1 + self.width)

    def update(self, value: float) -> None:
        """Follow a new k-th score: several times the last change is the width of the next bracket.

        Args:
            value: the k-th score that was selected.
        """
        if not math.isfinite(value) or value < 0:
            self.value = None
            return
        if self.value:
            change = abs(value / self.value - 1)
            self.width = min(WIDEST, max(4 * change, 0.9 * self.width, NARROWEST))
        self.value = value
