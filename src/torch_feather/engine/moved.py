"""Latent weights and states that follow parameters to another device, type or shape of shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..methods.base import BoundMethod
from ..weights.kept import keep_nonzero
from ..weights.latent import LatentWeights, PerTensor, copy_all
from ..weights.shards import local, local_part


def move_latent(
    before: LatentWeights,
    effective: Sequence[Tensor],
    weights: LatentWeights,
    parameters: Sequence[Tensor],
) -> None:
    """Copy latent weights into new ones. Where a parameter was changed meanwhile, its value counts.

    Args:
        before: the latent weights so far.
        effective: their effective values.
        weights: the latent weights of the moved parameters, which are written.
        parameters: the moved parameters, one per weight tensor.

    Example:
        >>> before, moved = LatentWeights([torch.tensor([1.0, 2.0])]), torch.tensor([0.0, 5.0])
        >>> weights = LatentWeights([moved])
        >>> move_latent(before, [torch.tensor([0.0, 2.0])], weights, [moved])
        >>> weights.views[0]
        tensor([1., 5.])
    """
    whole = before.shards is None  # `fully_shard` may have been applied since then
    for p, u, old, new in zip(parameters, effective, before.views, weights.views, strict=True):
        if whole:
            u, old = local_part(u, p), local_part(old, p)
        held = local(p)
        latent = keep_nonzero(old.to(held), old)  # also in a narrower type
        new.copy_(torch.where(held == u.to(held), latent, held))


def move_state(method: BoundMethod, weights: LatentWeights) -> None:
    """Move the state of a method to the device and type of latent weights.

    Args:
        method: the method, bound to the weights. Its state is replaced.
        weights: the latent weights on the new device or of the new type.

    Example:
        >>> from torch import nn
        >>> from torch_feather.methods import asl
        >>> from torch_feather.context import MethodContext
        >>> context = MethodContext(nn.Linear(1, 1), ["w"], LatentWeights([torch.ones(1)]), 0.0, 10)
        >>> method = asl(sparsity=0.0).bind(context)
        >>> move_state(method, LatentWeights([torch.ones(1, dtype=torch.float64)]))
        >>> method.state["deviations"].flat.dtype
        torch.float64
    """
    for name, entry in method.state.items():
        dtype = weights.wide if entry.flat.is_floating_point() else entry.flat.dtype
        if entry.per_weight:
            moved = weights.per_weight(0.0, dtype)
            copy_all(moved.rows, entry.rows)
        else:
            moved = PerTensor.of(entry.flat.to(weights.device, dtype))
        method.state[name] = moved
