"""The result of a selection: the boundary between pruned and kept scores."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import devices
from .float_bits import FloatBits


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


def cutoff_at(k: Tensor, code: Tensor, tied: Tensor, last: Tensor, bits: FloatBits) -> Cutoff:
    """Return the cutoff at the code of the k-th score.

    Args:
        k: number of pruned scores.
        code: code of the k-th score (see `Passes`).
        tied: whether a kept score has this code too.
        last: flat index of the last pruned score that has it.
        bits: the float type of the scores.

    Example:
        >>> from torch_feather.selection.float_bits import FLOAT_BITS
        >>> one = torch.tensor(1.0).view(torch.int32).long()
        >>> k, tied, last = torch.tensor(2), torch.tensor(False), torch.tensor(4)
        >>> float(cutoff_at(k, one, tied, last, FLOAT_BITS[torch.float32]).value)
        1.0
    """
    dtype = torch.float32 if bits.integer == torch.int32 else torch.float64
    code = code.clamp(max=bits.infinity)
    value = code.to(bits.integer).view(dtype)
    # One step towards 0 is one less as an integer.
    threshold = (code - tied.long()).clamp(min=0).to(bits.integer).view(dtype)
    some = k > 0
    return Cutoff(
        torch.where(some, value, -1.0), torch.where(some, last, -1), torch.where(some, threshold, 0)
    )
