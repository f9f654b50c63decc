"""Weights that may be kept, found while a copy of all weights is in a CPU's cache.

Most weights are pruned. If the few others are known, the pass that writes the effective weights
need not search for them. They only decide how fast it is, never its result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..selection.cpu import INTEGER, magnitude_bits
from ..threads import scratch

MOST = 0.2
"""Largest fraction of candidates that are held."""
ROOM = 0.068
"""Memory that candidates may take, as a fraction of the memory of the weights."""
TURNS = 16
"""Number of neighbouring ranges that share the memory for values."""


class Candidates(NamedTuple):
    """The weights of a range with a magnitude above a bound.

    Example:
        >>> Candidates(5, np.uint16([1, 2]), None).bound
        5
    """

    bound: int
    """As an integer."""
    at: np.ndarray
    """Their positions in the range, uint16, ascending."""
    values: np.ndarray | None
    """The weights; None if there was no room for them."""

    def of(self, w: np.ndarray) -> np.ndarray:
        """Return the candidates among the weights of the range."""
        return w.take(self.at) if self.values is None else self.values


def covering(
    candidates: Mapping[int, Candidates],
    rows: Sequence[int],
    limits: np.ndarray,
    scales: np.ndarray,
) -> list[Candidates | None]:
    """Return the candidates of ranges that hold every weight with a score above a limit.

    Args:
        candidates: by range.
        rows: the ranges.
        limits: for each of them, as integers.
        scales: for each of them; scores are magnitudes times this. Products keep the order of the
            magnitudes, also when they are rounded.

    Returns:
        None for ranges whose candidates are unknown or too few.

    Example:
        >>> bound, limit = np.float32([0.5, 1.0]).view(np.int32).tolist()
        >>> known = Candidates(bound, np.uint16([]), None)
        >>> found = covering({0: known}, [0, 0], np.array([limit] * 2), np.float32([2.0, 2.5]))
        >>> [one is known for one in found]
        [True, False]
    """
    integer = INTEGER[scales.dtype]
    known = [candidates.get(j) for j in rows]
    most = np.iinfo(integer).max  # a NaN
    bounds = np.array([most if one is None else one.bound for one in known], integer)
    with np.errstate(all="ignore"):
        scores = bounds.view(scales.dtype) * scales
    enough = (np.abs(scores).view(integer) <= limits) & ~np.isnan(scores)
    return [one if ok else None for one, ok in zip(known, enough.tolist(), strict=True)]


def collect(
    w: np.ndarray, low: int, high: int, turn: int = 0
) -> tuple[int, np.ndarray, Candidates | None]:
    """Count and collect magnitudes as `Scores.collect`, and find candidates above the same bound.

    Args:
        w: the weights of a range, of at most 65536.
        low: the lower bound, as an integer.
        high: the upper bound, as an integer; not above `low` if nothing is to be collected.
        turn: position of the range; it decides whether values are held if there is room for some.

    Returns:
        The number of magnitudes up to `low`, those strictly between the bounds, and the candidates;
        None if they are too many. If there is room for positions, but not for all values, some of
        the ranges hold theirs: that is faster than a part of the values in each of them.

    Example:
        >>> low, high = np.float32([1.0, 3.0]).view(np.int32).tolist()
        >>> count, near, candidates = collect(np.float32([1.0, -2.0, 3.0, 0.5, 0.25]), low, high)
        >>> count, near.view(np.float32).tolist(), candidates
        (3, [2.0], None)
    """
    bits = magnitude_bits(w)
    above = np.greater(bits, low, out=scratch("above", bits.size, bool))
    count = int(np.count_nonzero(above))
    room = ROOM * w.nbytes - _POSITIONS.itemsize * count
    if room < 0 or count > MOST * w.size:
        within = np.less(bits, high, out=scratch("within", bits.size, bool))
        return w.size - count, bits[np.logical_and(within, above, out=within)], None
    at, values = choose(w, above, count)
    scores = values.view(bits.dtype) & np.iinfo(bits.dtype).max
    fraction = room / max(values.nbytes, 1)
    holds = int((turn % TURNS + 1) * fraction) > int(turn % TURNS * fraction)
    found = Candidates(low, at, values if holds else None)
    return w.size - count, scores[scores < high], found


_POSITIONS = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 8)


def choose(w: np.ndarray, mask: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the True in a mask, and the weights there.

    `nonzero` is slow if 1% to 10% are True, because a processor predicts none of them. So words of
    eight are searched first, of which more are not 0. All that follows is on few numbers, where a
    call costs more than its work.

    Args:
        w: the weights of a range, of at most 65536, contiguous.
        mask: bool, contiguous.
        count: how many are True.

    Returns:
        Positions as uint16, and weights.

    Example:
        >>> at, values = choose(np.arange(96.0), np.arange(96) % 20 == 3, 5)
        >>> at, values
        (array([ 3, 23, 43, 63, 83], dtype=uint16), array([ 3., 23., 43., 63., 83.]))
    """
    if not 0.01 * mask.size <= count <= 0.1 * mask.size or mask.size % 8:
        index = mask.nonzero()[0]
        return index.astype(np.uint16), w.take(index)
    words = mask.view(np.uint64)
    word = np.not_equal(words, 0, out=scratch("words", words.size, bool)).nonzero()[0]
    lane = words.take(word).view(bool).nonzero()[0]
    at = _POSITIONS.take(word, axis=0).reshape(-1).take(lane)
    return at, w.reshape(-1, 8).take(word, axis=0).reshape(-1).take(lane)
