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

    Checksums of masks and latent weights, and the step, are compared. Of sharded weights, those
    held more than once are compared.

    Args:
        model: the model.
        names: names of the weight tensors.
        parameters: the parameters, which hold effective weights.
        weights: the latent weights.
        step: optimizer steps taken, 0-dimensional.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    mine = [
        (local_box(p), checksum((local(p) != 0).byte()), checksum(view))
        for p, view in zip(parameters, weights.views, strict=True)
    ]
    if weights.shards is not None:
        groups = weights.shards.groups
    else:
        groups = [getattr(model, "process_group", None)]  # of DistributedDataParallel
    every = sorted(gather((dist.get_rank(), int(step), mine), groups))
    steps = {step for _, step, _ in every}
    if len(steps) > 1:
        raise StateError(f"The ranks have taken different numbers of steps: {sorted(steps)}.")
    for what, which in (("Masks", 1), ("Latent weights", 2)):
        found: dict[str, set[int]] = {}
        for i, name in enumerate(names):
            first: dict[Any, int] = {}
            for rank, _, held in every:
                if first.setdefault(held[i][0], held[i][which]) != held[i][which]:
                    found.setdefault(name, set()).add(rank)
        if found:
            ranks = sorted(set.union(*found.values()))
            raise StateError(
                f"{what} of {some(list(found))} differ between ranks: ranks {ranks} differ from the "
                "first one. Start all ranks from the same weights (wrap the model before sparsify), "
                "and let only the optimizer change them."
            )
