"""Whether all processes of a training hold the same: `Sparsifier.check_ranks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..engine.binding import Slot
from ..errors import StateError, some
from .checksum import checksum
from .latent import LatentWeights
from .shards import box_of, gather


def check_ranks(
    model: nn.Module, slots: Sequence[Slot], weights: LatentWeights, step: Tensor
) -> None:
    """Raises StateError unless what is held by several processes is alike, bit by bit.

    Masks, latent weights and the step are compared, by checksums. Of sharded weights those are
    compared that are held more than once.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    mine = [
        (box_of(s.parameter), checksum((s.local != 0).byte()), checksum(view))
        for s, view in zip(slots, weights.views, strict=True)
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
        for i, slot in enumerate(slots):
            first: dict[Any, int] = {}
            for rank, _, held in every:
                if first.setdefault(held[i][0], held[i][which]) != held[i][which]:
                    found.setdefault(slot.name, set()).add(rank)
        if found:
            ranks = sorted(set.union(*found.values()))
            raise StateError(
                f"{what} of {some(list(found))} differ between ranks: those of {ranks} are not "
                "those of the first. Start all from the same weights (wrap the model before "
                "sparsify), and let nothing but the optimizer change them."
            )
