"""What a selection must find, by the plainest means: a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor

from .cut import Cut


def select_reference(scores: Tensor, k: int) -> Cut:
    """The cut that prunes the k smallest scores in the order of (score, flat index).

    The definition that `select_cpu` and `select_device` are tested against, field by field.

    Args:
        scores: flat float32 or float64 tensor of numbers >= 0; NaN ranks above infinity.
        k: number of scores to prune, 0 <= k <= number of scores.
    """
    total = scores.numel()
    if not 0 <= k <= total:
        raise ValueError(f"k = {k} is outside 0..{total}, the number of scores")
    infinity = scores.new_tensor(torch.inf)
    everywhere = torch.tensor(total - 1, device=scores.device)
    if k == 0:
        return Cut(
            scores.new_tensor(-1.0), torch.full_like(everywhere, -1), torch.zeros_like(infinity)
        )

    order = torch.sort(scores, stable=True).indices
    last = order[k - 1]
    value = scores[last]
    if value.isnan():
        return Cut(infinity, everywhere, infinity)
    tied = k < total and bool(scores[order[k]] == value)
    if not tied:
        return Cut(value, everywhere, value)
    return Cut(value, last, torch.nextafter(value, torch.zeros_like(value)))
