"""Fine-tuning with a fixed mask: zeros stay zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .engine.wrappers import plain_optimizer
from .errors import ConfigurationError, some
from .prunable import Filters, find_prunable
from .weights.shards import local, reshard


class FixedMask:
    """Keeps zeros: sets weights that are 0 at its creation to 0 after every optimizer step.

    Created by `keep_zeros` and by `Sparsifier.finalize(keep_masks=True)`; `remove()` ends it.

    Args:
        parameters: the weights.
        optimizers: the optimizers that train them.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> _ = nn.init.zeros_(model.weight)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mask = FixedMask([model.weight], [optimizer])
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> model.weight.count_nonzero().item()
        0
    """

    def __init__(self, parameters: Sequence[Tensor], optimizers: Sequence[Optimizer]):
        self._zeros = [(p, local(p).detach() == 0) for p in parameters]
        self._handles = [
            plain_optimizer(o).register_step_post_hook(self._refill) for o in optimizers
        ]

    @torch.no_grad()
    def _refill(self, optimizer: Optimizer, *_: Any) -> None:
        # Parameters of other optimizers are left alone: this one may step in the backward pass.
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameter, zero in self._zeros:
            if id(parameter) in held:
                shard = local(parameter)
                shard.masked_fill_(zero.to(shard.device), 0.0)

    def remove(self) -> None:
        """Remove the hooks; pruned weights may become nonzero from now on."""
        for handle in self._handles:
            handle.remove()


def keep_zeros(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    include: Filters = None,
    exclude: Filters = None,
) -> FixedMask:
    """Keep the zeros of a sparse model during further training. Momentum would revive them.

    Args:
        model: a sparse model, such as a finalized or a loaded one.
        optimizer: the optimizer that trains it, or several.
        include, exclude: filters that choose the weights, see `prunable.find_prunable`.

    Returns:
        The fixed mask. No state dict contains it: call `keep_zeros` again after a restart.

    Raises:
        ConfigurationError: a trainable weight is held by no optimizer.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> _ = nn.init.zeros_(model.weight)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mask = keep_zeros(model, optimizer)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> model.weight.count_nonzero().item()
        0
    """
    given = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    optimizers = [plain_optimizer(one) for one in given]
    reshard(model)
    found = find_prunable(model, include, exclude)
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    missing = [p.name for p in found if p.parameter.requires_grad and id(p.parameter) not in held]
    if missing:
        raise ConfigurationError(
            f"No optimizer holds {some(missing)}, so its zeros would not be kept. Pass all "
            "optimizers that train the model to keep_zeros, or exclude these weights (exclude=)."
        )
    return FixedMask([p.parameter for p in found], optimizers)
