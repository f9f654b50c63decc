"""Checks of weights that are sharded over processes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import ConfigurationError, StateError
from ..methods.base import BoundMethod
from ..weights.latent import LatentWeights
from ..weights.shards import is_sharded, local

ONE_PROCESS = (
    "This method needs whole weight tensors in one process, but the weights are sharded over "
    "several. On shards use feather, feather-gmp, feather-flops, feather-ham, hard-ste, soft-ste, "
    "gmp, st3 or st3-sigma without patterns (st3 not for transposed convolutions and Conv1D, whose "
    "shards hold parts of all output channels), asl, asl+, feather-asl+ or str. All other methods "
    "work with DistributedDataParallel."
)


def require_shards_supported(method: BoundMethod, weights: LatentWeights) -> None:
    """Check that a method supports the sharding of the weights.

    Args:
        method: the method.
        weights: the latent weights.

    Raises:
        ConfigurationError: the weights are sharded, and the method needs full weight tensors.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from torch_feather.methods import Facts
        >>> method = SimpleNamespace(facts=Facts(on_shards=False))
        >>> require_shards_supported(method, LatentWeights([torch.ones(2)]))  # not sharded
    """
    if weights.shards is not None and not method.facts.on_shards:
        raise ConfigurationError(ONE_PROCESS)


def check_shards(before: LatentWeights, current: Sequence[Tensor]) -> None:
    """Check that parameters which were sharded still have the same shards.

    Args:
        before: the latent weights.
        current: the present parameters.

    Raises:
        StateError: they were sharded, and now have other shards or none.

    Example:
        >>> import torch
        >>> w = torch.ones(2)
        >>> check_shards(LatentWeights([w]), [w])
    """
    if before.shards is not None and not all(
        is_sharded(p) and local(p).shape == old.shape
        for p, old in zip(current, before.views, strict=True)
    ):
        raise StateError(
            "The shards of the model changed after sparsify. Create optimizer and sparsifier "
            "again, and load their state dicts by torch.distributed.checkpoint."
        )
