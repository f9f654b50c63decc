"""Selection on a CPU: a sample brackets the k-th score, one pivot finds it in the bracket."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .cutoff import Cutoff

SMALL = 1 << 16
"""Below this number of scores a sample gains nothing."""
BLOCK = 1 << 16
"""Scores compared at a time, which bounds the temporary memory."""
MARGIN = 4.0
"""Half-width of the bracket in standard deviations of the sampled rank; it misses 1 in 16000."""


def select_cpu(fill: Callable[[], Tensor], k: int) -> Cutoff:
    """Return the cutoff of the k smallest scores, by a partition around the k-th one.

    Args:
        fill: returns the scores, as for `select`.
        k: number of scores to prune.

    Example:
        >>> float(select_cpu(lambda: torch.tensor([3.0, 1.0, 2.0]), 2).value)
        2.0
    """
    scores = fill()
    if k == 0:
        return Cutoff(scores.new_tensor(-1.0), torch.tensor(-1), scores.new_tensor(0.0))
    array = scores.numpy()
    near, rank = _bracket(array, k)
    if near.min() != near.max():  # partition is slow on equal scores, such as initial zeros
        near.partition(rank - 1)
    value, kept = near[rank - 1], near[rank:]
    if np.isnan(value):  # more NaN than kept weights: all other scores are pruned, NaN never
        infinity = scores.new_tensor(np.inf)
        return Cutoff(infinity, torch.tensor(scores.numel() - 1), infinity)
    # fmin, not min: NaN must not hide a tie.
    tied = kept.size > 0 and bool(np.fmin.reduce(kept) == value)
    if not tied:
        last, threshold = scores.numel() - 1, value
    else:
        needed = int(np.count_nonzero(near[:rank] == value))
        in_order = fill().numpy() if near is array else array
        last = int(np.flatnonzero(in_order == value)[needed - 1])
        threshold = np.nextafter(value, value.dtype.type(0))
    return Cutoff(
        scores.new_tensor(value.item()), torch.tensor(last), scores.new_tensor(threshold.item())
    )


def _bracket(scores: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    """Return few scores that include all equal to the k-th smallest, and its rank among them.

    A sample brackets the k-th score between two values, as in SELECT (Floyd and Rivest, 1975), and
    a count of the scores below confirms the bracket. If it does not hold, all scores are returned.

    Why not partition all scores: with NumPy's AVX2 code that is as fast. With its AVX-512 code on
    AMD's Zen 4 it is seven times slower, because compressing stores are slow there.
    """
    size = scores.size
    if size < SMALL:
        return scores, k
    # An odd step, so that it does not stay within one column of a weight matrix.
    sample = scores[:: int(size ** (1 / 3)) | 1].copy()
    center = k / size * sample.size
    half_width = MARGIN * (center * (1 - k / size)) ** 0.5 + 1
    low, high = int(center - half_width), int(center + half_width)
    sample.partition([rank for rank in (low, high) if 0 < rank < sample.size] or [0])
    least = sample[low] if low > 0 else 0
    most = sample[high] if high < sample.size else np.inf
    below, near = 0, []
    for start in range(0, size, BLOCK):
        block = scores[start : start + BLOCK]
        under = block < least
        below += int(np.count_nonzero(under))
        near.append(block[np.greater(block <= most, under)])  # within both bounds
    bracketed = np.concatenate(near)
    if not below < k <= below + bracketed.size:
        return scores, k
    return bracketed, k - below
