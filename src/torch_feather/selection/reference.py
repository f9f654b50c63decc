"""The definition of a selection, as a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor

from .cutoff import Cutoff


def select_reference(scores: Tensor, k: int) -> Cutoff:
    """Return the cutoff that prunes the k smallest scores in the order of (score, flat index).

    `select_cpu`, `select_device` and `select_sharded` are tested against it, field by field.

    Args:
        scores: flat float32 or float64 tensor of numbers >= 0; NaN ranks above infinity.
        k: number of scores to prune, 0 <= k <= number of scores.

    Raises:
        ValueError: k is out of range.

    Example:
        >>> float(select_reference(torch.tensor([3.0, 1.0, 2.0]), 2).value)
        2.0
    """
    total = scores.numel()
    if not 0 <= k <= total:
        raise ValueError(f"k = {k} is outside 0..{total}, the number of scores")
    infinity = scores.new_tensor(torch.inf)
    everywhere = torch.tensor(total - 1, device=scores.device)
    if k == 0:
        return Cutoff(
            scores.new_tensor(-1.0), torch.full_like(everywhere, -1), torch.zeros_like(infinity)
        )

    order = torch.sort(scores, stable=True).indices
    last = order[k - 1]
    value = scores[last]
    if value.isnan():
        return Cutoff(infinity, everywhere, infinity)
    tied = k < total and bool(scores[order[k]] == value)
    if not tied:
        return Cutoff(value, everywhere, value)
    return Cutoff(value, last, torch.nextafter(value, torch.zeros_like(value)))
