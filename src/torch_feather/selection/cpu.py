"""Selection on a CPU: few scores around the k-th one are collected, and it is found among them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..threads import for_each, scratch
from .bracket import Bracket
from .cutoff import Cutoff

SMALL = 1 << 16
"""Below this number of scores a bracket gains nothing."""
BLOCK = 1 << 16
"""Scores compared at a time, which bounds the temporary memory."""
MARGINS = 4.0, 16.0
"""Half-widths of the bracket in standard deviations of the sampled rank; 4 miss 1 in 16000."""

INTEGER: dict[Any, Any] = {np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}


class Near(NamedTuple):
    """The collected scores of neighbouring ranges.

    Example:
        >>> near = Near.of(np.array([0, 3]), np.array([3, 4]), [np.int32([5]), np.int32([7])])
        >>> near.scores, near.end
        (array([5, 7], dtype=int32), array([1, 2]))
    """

    start: np.ndarray
    """First position of each range."""
    stop: np.ndarray
    """End of each range."""
    end: np.ndarray
    """End of the scores of each range in `scores`."""
    scores: np.ndarray
    """As integers, in the order of their positions."""

    @classmethod
    def of(cls, start: np.ndarray, stop: np.ndarray, scores: Sequence[np.ndarray]) -> Near:
        """Return the scores of each range as one object."""
        end = np.cumsum([part.size for part in scores])
        return cls(start, stop, end, np.concatenate(scores))


class Scores(ABC):
    """Scores >= 0 in blocks; NaN ranks above infinity.

    A block holds the bits of its scores as integers without the sign. They are ordered like the
    scores, and any NaN is above infinity.

    Attributes:
        size: number of scores.
        dtype: NumPy type of the scores.

    Example:
        >>> TensorScores(torch.tensor([3.0, 1.0, 2.0])).size
        3
    """

    size: int
    dtype: np.dtype

    @abstractmethod
    def block(self, start: int, stop: int) -> np.ndarray:
        """Return scores start to stop as integers, in memory that the next call may use again."""

    @abstractmethod
    def sample(self, step: int) -> np.ndarray:
        """Return every `step`-th score, in new memory."""

    def collect(self, start: int, stop: int, low: int, high: int) -> tuple[int, np.ndarray]:
        """Count the scores up to `low`, and return those strictly between `low` and `high`.

        Args:
            start: first score.
            stop: end of the range.
            low: the lower bound, as an integer.
            high: the upper bound, as an integer.
        """
        bits = self.block(start, stop)
        count, inside = between(bits, low, high)
        return count, bits[inside]

    def collect_all(self, low: float, high: float) -> tuple[int, Near]:
        """Count the scores up to `low`, and return those strictly between `low` and `high`."""
        least, most = self.as_integer(low), self.as_integer(high)

        def collect(start: int) -> tuple[int, np.ndarray]:
            return self.collect(start, min(start + BLOCK, self.size), least, most)

        start = np.arange(0, max(self.size, 1), BLOCK)
        parts = for_each(collect, start.tolist())
        near = Near.of(start, np.minimum(start + BLOCK, self.size), [near for _, near in parts])
        return sum(count for count, _ in parts), near

    def as_integer(self, value: float | np.floating) -> int:
        """Return the bits of a score as an integer."""
        return as_integer(value, self.dtype)

    def count_up_to(self, bound: int) -> int:
        """Return the number of scores up to a bound, as an integer."""
        return sum(
            for_each(
                lambda a: int(np.count_nonzero(self._block(a) <= bound)), range(0, self.size, BLOCK)
            )
        )

    def find(self, value: int, n: int, near: Near | None) -> int:
        """Return the index of the n-th score, from 1, that equals a value, as an integer.

        Args:
            value: the score.
            n: its number.
            near: collected scores, if the value is among them.
        """
        start, stop = 0, self.size
        if near is not None:
            equal = np.flatnonzero(near.scores == value)
            j = int(np.searchsorted(near.end, equal[n - 1], "right"))
            if j > 0:
                n -= int(np.searchsorted(equal, near.end[j - 1]))
            start, stop = int(near.start[j]), int(near.stop[j])
        return self._find_in(range(start, stop, BLOCK), stop, value, n)

    def _find_in(self, starts: Iterable[int], end: int, value: int, n: int) -> int:
        for a in starts:
            equal = self.block(a, min(a + BLOCK, end)) == value
            count = int(np.count_nonzero(equal))
            if n <= count:
                return a + int(np.flatnonzero(equal)[n - 1])
            n -= count
        raise AssertionError("fewer scores equal the value")

    def _block(self, start: int) -> np.ndarray:
        return self.block(start, min(start + BLOCK, self.size))


class TensorScores(Scores):
    """The scores in a tensor.

    Args:
        scores: flat float32 or float64 tensor of numbers >= 0, on the CPU. It is only read.

    Example:
        >>> TensorScores(torch.tensor([1.0, 2.0])).block(0, 1).view(np.float32).tolist()
        [1.0]
    """

    def __init__(self, scores: Tensor):
        self._array = scores.numpy()
        self.size, self.dtype = self._array.size, self._array.dtype

    def block(self, start: int, stop: int) -> np.ndarray:
        return magnitude_bits(self._array[start:stop])

    def sample(self, step: int) -> np.ndarray:
        return np.abs(self._array[::step])


def between(bits: np.ndarray, low: int, high: int) -> tuple[int, np.ndarray]:
    """Count the scores up to `low`, and return the mask of those strictly between the bounds.

    Args:
        bits: scores as integers.
        low: the lower bound, as an integer.
        high: the upper bound, as an integer.

    Example:
        >>> between(np.int32([1, 5, 3]), 1, 5)
        (1, array([False, False,  True]))
    """
    above = np.greater(bits, low, out=scratch("above", bits.size, bool))
    count = bits.size - int(np.count_nonzero(above))
    within = np.less(bits, high, out=scratch("within", bits.size, bool))
    return count, np.logical_and(within, above, out=within)


def as_integer(value: float | np.floating, dtype: np.dtype) -> int:
    """Return the bits of a number as an integer.

    Args:
        value: the number.
        dtype: its type, float32 or float64.

    Example:
        >>> hex(as_integer(1.0, np.dtype(np.float32)))
        '0x3f800000'
    """
    return int(np.array(value, dtype).view(INTEGER[dtype]))


def magnitude_bits(values: np.ndarray, scale: Any = None) -> np.ndarray:
    """Return the bits of |values|, or of |values| * scale, as integers, in memory of this thread.

    Args:
        values: float32 or float64, flat.
        scale: a number of the same type, >= 0, or one for each value.

    Example:
        >>> magnitude_bits(np.float32([-2.0]), np.float32(3.0)).view(np.float32).tolist()
        [6.0]
    """
    integer = INTEGER[values.dtype]
    out = scratch("bits", values.size, integer)
    if scale is not None:
        with np.errstate(all="ignore"):
            np.multiply(values, scale, out=out.view(values.dtype))
    # Clearing the sign makes -0 a zero, and the NaN that x86 produces (negative) a NaN.
    source = values.view(integer) if scale is None else out
    return np.bitwise_and(source, np.iinfo(integer).max, out=out)


class Collected(NamedTuple):
    """What `Scores.collect_all` returns, found before a selection.

    Example:
        >>> nothing = Near.of(np.array([0]), np.array([3]), [np.empty(0, np.int32)])
        >>> Collected((1.0, 2.0), 3, nothing, []).below
        3
    """

    bounds: tuple[float, float]
    """Lower and upper bound."""
    below: int
    """Number of scores up to the lower bound."""
    near: Near
    """Scores strictly between the bounds."""
    versions: list[int]
    """Versions of the tensors that were read."""


def select_cpu(fill: Callable[[], Tensor], k: int) -> Cutoff:
    """Return the cutoff of the k smallest scores in a tensor.

    Args:
        fill: returns the scores, as for `select`.
        k: number of scores to prune.

    Example:
        >>> float(select_cpu(lambda: torch.tensor([3.0, 1.0, 2.0]), 2).value)
        2.0
    """
    return select_scores(TensorScores(fill()), k)


def select_scores(scores: Scores, k: int, bracket: Bracket | None = None) -> Cutoff:
    """Return the cutoff of the k smallest scores; no memory of their size is allocated.

    Args:
        scores: the scores.
        k: number of scores to prune.
        bracket: where the k-th score is expected; it is updated. None if nothing is known.

    Example:
        >>> bracket = Bracket()
        >>> float(select_scores(TensorScores(torch.tensor([3.0, 1.0, 2.0])), 2, bracket).value)
        2.0
        >>> bracket.value
        2.0
    """
    number, everywhere = scores.dtype.type, scores.size - 1
    if k == 0:
        return _cutoff(number(-1.0), -1, number(0.0))
    found = None
    if bracket is not None and bracket.bounds is not None and scores.size >= SMALL:
        found = _find(scores, k, *bracket.bounds)
    if found is None:
        found = _sampled(scores, k)
    value, below, equal, near = found
    if bracket is not None:
        bracket.update(float(value))
    if np.isnan(value):  # more NaN than kept weights: all other scores are pruned, NaN never
        return _cutoff(number(np.inf), everywhere, number(np.inf))
    if k == below + equal:
        return _cutoff(value, everywhere, value)
    last = scores.find(scores.as_integer(value), k - below, near)
    return _cutoff(value, last, np.nextafter(value, number(0)))


def _cutoff(value: np.floating, last: int, threshold: np.floating) -> Cutoff:
    return Cutoff(*(torch.from_numpy(np.asarray(x)) for x in (value, np.int64(last), threshold)))


Found = tuple[np.floating, int, int, Near | None]
"""The k-th smallest score, the number of smaller and of equal ones, and where equal ones are."""


def _find(scores: Scores, k: int, low: float, high: float) -> Found | None:
    """Return the k-th smallest score.

    Args:
        scores: the scores.
        k: rank, from 1.
        low: no score below it is expected to be the k-th; itself is allowed.
        high: no score above it is expected to be the k-th; itself is allowed.

    Returns:
        None if the k-th score is not within the bounds.
    """
    number = scores.dtype.type
    below, collected = scores.collect_all(low, high)
    if k <= below:  # at most `low`: only equality is known to be right, such as initial zeros
        smaller = scores.count_up_to(scores.as_integer(low) - 1)
        return (number(low), smaller, below - smaller, None) if smaller < k else None
    rank, size = k - below, collected.scores.size
    if rank > size:
        smaller = below + size
        equal = scores.count_up_to(scores.as_integer(high)) - smaller
        return (number(high), smaller, equal, None) if k <= smaller + equal else None
    near = collected.scores
    value = _smallest(near, rank)
    smaller = below + int(np.count_nonzero(near < value))
    equal = int(np.count_nonzero(near == value))
    found: np.floating = value.view(scores.dtype)
    return found, smaller, equal, collected


def _smallest(bits: np.ndarray, rank: int) -> np.signedinteger:
    """Return the rank-th smallest of scores, as integers, from rank 1.

    Scores between close bounds are spread almost evenly. So few are searched, around the one that
    the rank suggests; all of them if it is not there.
    """
    low, high = int(bits.min()), int(bits.max())
    step, half = (high - low) / bits.size, 2 * bits.size**0.5 + bits.size / 32
    least = max(low, int(low + step * (rank - half)))
    most = min(high, int(low + step * (rank + half)))
    below = int(np.count_nonzero(bits < least))
    chosen = bits[(bits >= least) & (bits <= most)]
    if not below < rank <= below + chosen.size:
        below, chosen = 0, bits.copy()
    if chosen.min() != chosen.max():  # partition is slow on equal scores
        chosen.partition(rank - below - 1)
    found: np.signedinteger = chosen[rank - below - 1]
    return found


def _sampled(scores: Scores, k: int) -> Found:
    """Return the k-th smallest score, or NaN if it is NaN.

    A sample brackets the k-th score between two values, as in SELECT (Floyd and Rivest, 1975), and
    a count of the scores below confirms the bracket. If it does not hold, a wider one is tried.

    Why not partition all scores: with NumPy's AVX2 code that is as fast. With its AVX-512 code on
    AMD's Zen 4 it is seven times slower, because compressing stores are slow there.
    """
    size = scores.size
    if size >= SMALL:
        # An odd step, so that it does not stay within one column of a weight matrix.
        sample = scores.sample(int(size ** (1 / 3)) | 1)
        sample.sort()
        center = k / size * sample.size
        for margin in MARGINS:
            half_width = margin * (center * (1 - k / size)) ** 0.5 + 1
            low, high = int(center - half_width), int(center + half_width)
            least = sample[low] if low > 0 else 0.0
            most = sample[high] if high < sample.size else np.inf
            if np.isnan(least):
                break
            found = _find(scores, k, least, np.inf if np.isnan(most) else most)
            if found is not None:
                return found
    found = _find(scores, k, 0.0, np.inf)
    return (scores.dtype.type(np.nan), 0, 0, None) if found is None else found
