"""Selection on CPU: one introselect pivot, in place, on the memory that is there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .cut import Cut


def select_cpu(fill: Callable[[], Tensor], k: int) -> Cut:
    """`select` for CPU tensors: a partition around the k-th score instead of a sort."""
    scores = fill()
    if k == 0:
        return Cut(scores.new_tensor(-1.0), torch.tensor(-1), scores.new_tensor(0.0))
    partitioned = scores.numpy()
    partitioned.partition(k - 1)
    value, kept = partitioned[k - 1], partitioned[k:]
    if np.isnan(value):  # more NaN than may be kept: all else is pruned, NaN never is
        infinity = scores.new_tensor(np.inf)
        return Cut(infinity, torch.tensor(scores.numel() - 1), infinity)
    # fmin, not min: NaN must not hide a tie.
    tied = kept.size > 0 and bool(np.fmin.reduce(kept) == value)
    if not tied:
        last, threshold = scores.numel() - 1, value
    else:
        needed = int(np.count_nonzero(partitioned[:k] == value))
        positions = np.flatnonzero(fill().numpy() == value)
        last, threshold = int(positions[needed - 1]), np.nextafter(value, value.dtype.type(0))
    return Cut(
        scores.new_tensor(value.item()), torch.tensor(last), scores.new_tensor(threshold.item())
    )
