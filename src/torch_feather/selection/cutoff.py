"""The result of a selection: the boundary between pruned and kept scores."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import devices


class Cutoff(NamedTuple):
    """A boundary between scores: those below it are pruned.

    Score i is pruned if it is less than `value`, or equal to `value` and i <= `last`. NaN is never
    pruned. If k exceeds the number of scores that are not NaN, `value` and `threshold` are infinite
    and `last` is the last index. All fields are 0-dimensional tensors on the device of the scores.

    Example:
        >>> cutoff = Cutoff(torch.tensor(2.0), torch.tensor(1), torch.tensor(2.0))
        >>> cutoff.pruned(torch.tensor([1.0, 2.0, 2.0, 3.0])).tolist()
        [True, True, False, False]
    """

    value: Tensor
    """The k-th smallest score; -1 if k = 0."""
    last: Tensor
    """Flat index (int64) of the last pruned score among those equal to `value`. If all of them are
    pruned, the index of the last score."""
    threshold: Tensor
    """tau for the operator: `value`, or one float step below it if a kept score equals it. So the
    effective weight of a kept score is not 0. 0 if k = 0."""

    def pruned(self, scores: Tensor, offset: int = 0) -> Tensor:
        """Return the mask of pruned scores.

        Args:
            scores: some of the scores, any shape.
            offset: flat index of the first of them.
        """
        known = scores.dtype in (torch.float32, torch.float64)
        if known and not devices.synchronizes(scores.device):  # NumPy compares faster
            values, bound = scores.detach().numpy(), self.value.to(scores.dtype).numpy()
            if self.last >= offset + scores.numel() - 1:
                return torch.as_tensor(np.less_equal(values, bound))
            if self.last < offset:
                return torch.as_tensor(np.less(values, bound))
        index = torch.arange(offset, offset + scores.numel(), device=scores.device)
        tied = (scores == self.value) & (index.view_as(scores) <= self.last)
        return (scores < self.value) | tied
