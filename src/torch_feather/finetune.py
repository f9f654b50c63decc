"""Zeros that stay: training on with a fixed mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .engine.binding import plain_optimizer
from .errors import ConfigurationError, some
from .prunable import Filters, find_prunable
from .weights.shards import local, reshard


class ZeroKeeper:
    """After every step of the optimizers, weights that were 0 at first are 0 again.

    Made by `keep_zeros` and by `Sparsifier.finalize(keep_masks=True)`; `remove()` ends it.
    """

    def __init__(self, parameters: Sequence[Tensor], optimizers: Sequence[Optimizer]):
        self._zeros = [(p, local(p).detach() == 0) for p in parameters]
        self._handles = [o.register_step_post_hook(self._refill) for o in optimizers]

    @torch.no_grad()
    def _refill(self, optimizer: Optimizer, *_: Any) -> None:
        # Nothing else is written to: it may step within the backward pass, before the others.
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameter, zero in self._zeros:
            if id(parameter) in held:
                here = local(parameter)
                here.masked_fill_(zero.to(here.device), 0.0)

    def remove(self) -> None:
        """Pruned weights may come back from now on."""
        for handle in self._handles:
            handle.remove()


def keep_zeros(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    include: Filters = None,
    exclude: Filters = None,
) -> ZeroKeeper:
    """Trains a sparse model on without losing its zeros, which momentum would revive.

    Args:
        model: a model that is sparse already: finalized, or loaded from a file.
        optimizer: what trains it, one or several.
        include, exclude: which weights, see `prunable.find_prunable`.

    Returns:
        The keeper; nothing of it is in any state dict, so call this again after a restart.

    Raises:
        ConfigurationError: a trainable weight is held by none of the optimizers.
    """
    given = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    optimizers = [plain_optimizer(one) for one in given]
    reshard(model)
    found = find_prunable(model, include, exclude)
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    missing = [p.name for p in found if p.parameter.requires_grad and id(p.parameter) not in held]
    if missing:
        raise ConfigurationError(
            f"No optimizer holds {some(missing)}: its zeros would not be kept. Give keep_zeros all "
            "optimizers that train the model, or leave these weights out: exclude=."
        )
    return ZeroKeeper([p.parameter for p in found], optimizers)
