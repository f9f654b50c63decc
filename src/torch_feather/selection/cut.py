"""What a selection finds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Cut(NamedTuple):
    """A boundary through scores: the pruned ones lie below it.

    Score i is pruned if it is < `value`, or equal to it and i <= `last`; NaN never is. Where k
    exceeds the number of scores that are not NaN, `value` and `threshold` are infinite and `last`
    is the last index. All fields are 0-dimensional tensors on the device of the scores.
    """

    value: Tensor
    """The k-th smallest score; -1 where k = 0."""
    last: Tensor
    """Flat index (int64) of the last pruned score among those equal to `value`; that of the very
    last score where none of them is kept."""
    threshold: Tensor
    """tau for the operator: `value`, or one float step below it where a kept score ties with it
    (so that the survivor's image is not 0); 0 where k = 0."""

    def pruned(self, scores: Tensor, offset: int = 0) -> Tensor:
        """Mask of pruned scores; `offset` is the flat index of the first one given."""
        index = torch.arange(offset, offset + scores.numel(), device=scores.device)
        tied = (scores == self.value) & (index.view_as(scores) <= self.last)
        return (scores < self.value) | tied
