"""Selection on CPU: a sample brackets the k-th score, one pivot places it within the bracket."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .cut import Cut

SMALL = 1 << 16
"""Below so many scores a sample gains nothing."""
BLOCK = 1 << 16
"""Scores compared at a time, which bounds the transient memory."""
MARGIN = 4.0
"""Half-width of the bracket in standard deviations of the sampled rank; it misses 1 in 16000."""


def select_cpu(fill: Callable[[], Tensor], k: int) -> Cut:
    """`select` for CPU tensors: a partition around the k-th score instead of a sort."""
    scores = fill()
    if k == 0:
        return Cut(scores.new_tensor(-1.0), torch.tensor(-1), scores.new_tensor(0.0))
    array = scores.numpy()
    near, rank = _bracket(array, k)
    if near.min() != near.max():  # a pivot splits many equal scores slowly (zeros, at first)
        near.partition(rank - 1)
    value, kept = near[rank - 1], near[rank:]
    if np.isnan(value):  # more NaN than may be kept: all else is pruned, NaN never is
        infinity = scores.new_tensor(np.inf)
        return Cut(infinity, torch.tensor(scores.numel() - 1), infinity)
    # fmin, not min: NaN must not hide a tie.
    tied = kept.size > 0 and bool(np.fmin.reduce(kept) == value)
    if not tied:
        last, threshold = scores.numel() - 1, value
    else:
        needed = int(np.count_nonzero(near[:rank] == value))
        in_order = fill().numpy() if near is array else array
        last = int(np.flatnonzero(in_order == value)[needed - 1])
        threshold = np.nextafter(value, value.dtype.type(0))
    return Cut(
        scores.new_tensor(value.item()), torch.tensor(last), scores.new_tensor(threshold.item())
    )


def _bracket(scores: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    """Few scores, among them all that equal the k-th smallest, and the rank that it has in them.

    A sample says between which two values the k-th lies, as in Floyd and Rivest's SELECT (1975);
    counting what is below confirms it. If it is not confirmed, all scores are returned.
    (Partitioning all at once is as fast where NumPy sorts by AVX2, but takes seven times as long
    by AVX-512 on AMD's Zen 4, whose compressing stores are slow.)
    """
    size = scores.size
    if size < SMALL:
        return scores, k
    # An odd step, so that it does not stay within one column of a weight matrix.
    sample = scores[:: int(size ** (1 / 3)) | 1].copy()
    center = k / size * sample.size
    spread = MARGIN * (center * (1 - k / size)) ** 0.5 + 1
    low, high = int(center - spread), int(center + spread)
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
