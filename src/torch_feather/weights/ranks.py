"""Whether all processes of a training run hold the same weights: `Sparsifier.check_ranks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..errors import StateError, some
from .checksum import checksum
from .latent import LatentWeights
from .shards import gather, local, local_box


def check_ranks(
    model: nn.Module,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    weights: LatentWeights,
    step: Tensor,
) -> None:
    """Raise StateError unless weights held by several processes have the same bits.

    Compares checksums of masks and latent weights, and the number of steps. Of sharded weights,
    only those that several processes hold are compared. Without torch.distributed it does nothing.

    Args:
        model: the model.
        names: names of the weight tensors.
        parameters: the parameters, which hold effective weights.
        weights: the latent weights.
        step: optimizer steps taken, 0-dimensional.

    Raises:
        StateError: names the weights and the ranks that differ from the first one; on all ranks.

    Example:
        >>> import torch
        >>> w = torch.ones(2)
        >>> check_ranks(nn.Linear(1, 1), ["w"], [w], LatentWeights([w]), torch.tensor(0))
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    own = [
        (local_box(p), checksum((local(p) != 0).byte()), checksum(view))
        for p, view in zip(parameters, weights.views, strict=True)
    ]
    if weights.shards is not None:
        groups = weights.shards.groups
    else:
        groups = [getattr(model, "process_group", None)]  # of DistributedDataParallel
    all_ranks = sorted(gather((dist.get_rank(), int(step), own), groups))
    steps = {step for _, step, _ in all_ranks}
    if len(steps) > 1:
        raise StateError(f"The ranks have taken different numbers of steps: {sorted(steps)}.")
    for kind, entry in (("Masks", 1), ("Latent weights", 2)):
        differing: dict[str, set[int]] = {}
        for i, name in enumerate(names):
            first: dict[Any, int] = {}  # checksum of each box on the first rank that holds it
            for rank, _, held in all_ranks:
                if first.setdefault(held[i][0], held[i][entry]) != held[i][entry]:
                    differing.setdefault(name, set()).add(rank)
        if differing:
            ranks = sorted(set.union(*differing.values()))
            raise StateError(
                f"{kind} of {some(list(differing))} differ between ranks: ranks {ranks} differ "
                "from the first one. Start all ranks from the same weights (wrap the model before "
                "sparsify), and let only the optimizer change them."
            )
