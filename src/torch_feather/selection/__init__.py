"""The exact k-th magnitude: which weights are the k smallest, ties included.

`select` finds the cutoff on any device, `select_sharded` over several processes. `reference.py`
defines the result.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import devices
from ..deprecation import renamed_names
from .cpu import select_cpu
from .cutoff import Cutoff
from .device import select_device
from .sharded import select_sharded

__all__ = ["Cutoff", "select", "select_sharded"]
__getattr__ = renamed_names(__name__, {"Cut": "Cutoff"})


def select(fill: Callable[[], Tensor], k: Tensor) -> Cutoff:
    """Return the cutoff that prunes exactly the k smallest scores.

    Scores are ordered by (score, flat index).

    Args:
        fill: returns the scores: a flat float32 or float64 tensor of numbers >= 0. NaN ranks above
            infinity. The selection may overwrite this memory, and may call `fill` a second time.
        k: number of scores to prune, 0-dimensional int64, 0 <= k <= number of scores, on the
            device of the scores. It is not read by the host on accelerators.

    Example:
        >>> import torch
        >>> cutoff = select(lambda: torch.tensor([3.0, 1.0, 2.0]), torch.tensor(2))
        >>> float(cutoff.value)
        2.0
    """
    if devices.synchronizes(k.device):
        return select_device(fill(), k)
    return select_cpu(fill, int(k))
