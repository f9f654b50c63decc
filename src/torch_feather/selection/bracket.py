"""A bracket around the next threshold, from the last one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

WIDEST = 0.02
"""Largest half-width, relative to the threshold; beyond it, a sample finds a narrower bracket. At
most 2% of normally distributed scores are within."""
NARROWEST = 1e-4
NARROWING = 0.8
"""Of the half-width in each step without a larger change. What is collected within a bracket needs
memory, so it must not stay wide for long after a jump of the sparsity."""


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
            self.width = min(WIDEST, max(4 * change, NARROWING * self.width, NARROWEST))
        self.value = value


class Brackets:
    """Where the next threshold of each of several ranges is expected; as `Bracket` for each.

    Attributes:
        value: the last thresholds, float64; 0 for none.
        width: half-width of each bracket, relative to `value`.

    Example:
        >>> brackets = Brackets(2)
        >>> brackets.update(np.array([0.0, 2.0]))
        >>> brackets.low()
        array([0.   , 1.984])
    """

    def __init__(self, size: int):
        self.value, self.width = np.zeros(size), np.full(size, 0.01)

    def low(self, more: float | np.ndarray = 0.0) -> np.ndarray:
        """Return the lower bounds.

        Args:
            more: adds to the relative widths.
        """
        return self.value * (1 - self.width - more)

    def update(self, value: np.ndarray) -> None:
        """Follow new thresholds."""
        known = (self.value > 0) & (value > 0) & np.isfinite(value)
        change = np.abs(np.divide(value, self.value, out=np.ones_like(value), where=known) - 1)
        width = np.clip(np.maximum(4 * change, NARROWING * self.width), NARROWEST, WIDEST)
        self.value, self.width = np.where(np.isfinite(value), value, 0.0), width
