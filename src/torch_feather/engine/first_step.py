"""A check before the first step: the parameters still hold the local effective weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import StateError


def several_processes() -> bool:
    """Return whether this process is one of several.

    Example:
        >>> several_processes()
        False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_not_replaced(pruned: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Raise if effective weights of another process replaced the local ones.

    The latent weights of that process were not copied. So training would continue with its zeros
    as latent weights.

    Args:
        pruned: the local mask of each weight tensor: True for pruned weights.
        parameters: the parameter of each.

    Raises:
        StateError: as many weights are 0 as are pruned, but others.

    Example:
        >>> check_not_replaced([torch.tensor([True, False])], [torch.tensor([0.0, 1.0])])
    """
    zeros = [parameter.detach() == 0 for parameter in parameters]
    counts = [sum(int(mask.sum()) for mask in masks) for masks in (pruned, zeros)]
    if 0 < counts[0] == counts[1] and not all(map(torch.equal, pruned, zeros)):
        raise StateError(
            "Between sparsify and the first step, the effective weights of another process "
            "replaced those of this one. DistributedDataParallel does so when it wraps a "
            "model. The latent weights were not replaced. Wrap the model first, then call "
            "sparsify. If the weights were loaded deliberately, call "
            "sparsifier.reset_latents()."
        )
