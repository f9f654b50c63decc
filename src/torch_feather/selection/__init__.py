"""The exact k-th magnitude: which weights are the k smallest, ties included.

`select` finds the cut on any device, `select_shards` over several processes; `reference.py` says
what they must find.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import devices
from .cpu import select_cpu
from .cut import Cut
from .device import select_device
from .shards import select_shards

__all__ = ["Cut", "select", "select_shards"]


def select(fill: Callable[[], Tensor], k: Tensor) -> Cut:
    """The cut that prunes exactly the k smallest scores, in the order of (score, flat index).

    Args:
        fill: returns the scores: a flat float32 or float64 tensor of numbers >= 0 (NaN ranks
            above infinity). Its memory belongs to the selection, which may overwrite it, and may
            call `fill` a second time to get the scores back.
        k: number of scores to prune, 0-dimensional int64, 0 <= k <= number of scores, on the
            device of the scores. On accelerators it is never read by the host.
    """
    if devices.synchronizes(k.device):
        return select_device(fill(), k)
    return select_cpu(fill, int(k))
