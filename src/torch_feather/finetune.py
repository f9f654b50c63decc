"""Fine-tuning with a fixed mask: zeros stay zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .engine.wrappers import plain_optimizer
from .errors import ConfigurationError, some, warn
from .participants import choose
from .prunable import Filters, unwrap
from .weights.shards import count_nonzero, is_sharded, local, reshard


class FixedMask:
    """Keeps pruned weights at 0 during training, without gradients.

    Pruned weights get the gradient 0 in every backward pass, so norms, clipping and logs see kept
    weights only. After every optimizer step they are set to 0, which weight decay or momentum
    would change. Created by `keep_zeros` and by `Sparsifier.finalize(keep_masks=True)`; `remove()`
    ends it.

    Args:
        parameters: the weights.
        optimizers: the optimizers that train them.
        pruned: masks of the pruned weights (True), shaped like the local shards of the parameters.
            None: the weights that are 0 now.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> model.weight.data = torch.tensor([[0.0, 1.0]])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mask = FixedMask([model.weight], [optimizer])
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> model.weight.grad
        tensor([[0., 1.]])
        >>> optimizer.step()
        >>> model.weight.detach()
        tensor([[0.0000, 0.9000]])
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        optimizers: Sequence[Optimizer],
        pruned: Sequence[Tensor] | None = None,
    ):
        if pruned is None:
            pruned = [local(p).detach() == 0 for p in parameters]
        self._pruned = list(zip(parameters, pruned, strict=True))
        self._handles: list[Any] = []
        for parameter, mask in self._pruned:
            _clear_gradient(parameter, mask)
            if parameter.requires_grad:
                self._handles.append(_without_gradient(parameter, mask))
        for optimizer in map(plain_optimizer, optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._clear_gradients))
            self._handles.append(optimizer.register_step_post_hook(self._refill))

    def _held_by(self, optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
        """Return the weights of an optimizer; another one may be within the backward pass."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [(p, mask) for p, mask in self._pruned if id(p) in held]

    def _clear_gradients(self, optimizer: Optimizer, *_: Any) -> None:
        # Gradients that were assigned, such as those of torch.func.grad, called no hook.
        for parameter, mask in self._held_by(optimizer):
            _clear_gradient(parameter, mask)

    @torch.no_grad()
    def _refill(self, optimizer: Optimizer, *_: Any) -> None:
        for parameter, mask in self._held_by(optimizer):
            shard = local(parameter)
            shard.masked_fill_(mask.to(shard.device), 0.0)

    def remove(self) -> None:
        """Remove the hooks; pruned weights may become nonzero from now on."""
        for handle in self._handles:
            handle.remove()


def _without_gradient(parameter: Tensor, mask: Tensor) -> Any:
    """Register a hook that sets new gradients of pruned weights to 0; return its handle."""
    if is_sharded(parameter):
        # `fully_shard` trains other tensors and writes `.grad`: it calls this kind of hook only.
        return parameter.register_post_accumulate_grad_hook(lambda p: _clear_gradient(p, mask))
    return parameter.register_hook(lambda gradient: _masked(gradient, mask))


@torch.no_grad()
def _clear_gradient(parameter: Tensor, mask: Tensor) -> None:
    """Set the gradient of pruned weights to 0 in `.grad`."""
    gradient = parameter.grad
    if gradient is None:
        return
    if gradient.layout != torch.strided:
        parameter.grad = _masked(gradient, mask)
        return
    shard = local(gradient)
    if shard.shape == mask.shape:
        shard.masked_fill_(mask.to(shard.device), 0.0)


def _masked(gradient: Tensor, mask: Tensor) -> Tensor:
    """Return a gradient that is 0 for pruned weights."""
    mask = mask.to(gradient.device)
    if gradient.layout != torch.sparse_coo:
        return gradient.masked_fill(mask, 0.0)
    gradient = gradient.coalesce()  # of an embedding with sparse=True
    values = gradient.values().masked_fill(mask[tuple(gradient.indices())], 0.0)
    return torch.sparse_coo_tensor(
        gradient.indices(), values, gradient.shape, is_coalesced=True, check_invariants=False
    )


def keep_zeros(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    include: Filters = None,
    exclude: Filters = None,
) -> FixedMask:
    """Keep the zeros of a sparse model during further training. Momentum would revive them.

    Zeros have no gradient, so norms and clipping see the other weights only.

    Args:
        model: a sparse model, such as a finalized or a loaded one.
        optimizer: the optimizer that trains it, or several.
        include, exclude: filters that choose the weights, as for `feather.sparsity`. Exclude layers
            that only start at zero, such as the second matrix of an adapter: a warning names
            layers of zeros that did not take part in sparse training.

    Returns:
        The fixed mask. No state dict contains it: call `keep_zeros` again after a restart.

    Raises:
        ConfigurationError: a trainable weight is held by no optimizer.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> model.weight.data = torch.tensor([[0.0, 1.0]])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> mask = keep_zeros(model, optimizer)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> model.weight.count_nonzero().item()
        1
    """
    given = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    optimizers = [plain_optimizer(one) for one in given]
    if not optimizers or not all(isinstance(one, Optimizer) for one in optimizers):
        raise ConfigurationError(
            "optimizer must be a torch.optim.Optimizer or a sequence of them, got "
            f"{optimizer!r:.80}."
        )
    reshard(unwrap(model))
    chosen = choose(model, include, exclude)
    found = chosen.weights
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    missing = [p.name for p in found if p.parameter.requires_grad and id(p.parameter) not in held]
    if missing:
        raise ConfigurationError(
            f"No optimizer holds {some(missing)}, so its zeros would not be kept. Pass all "
            "optimizers that train the model to keep_zeros, or exclude these weights (exclude=)."
        )
    empty = [
        p.name
        for p in found
        if p.parameter.requires_grad and p.parameter.numel() and not count_nonzero(p.parameter)
    ]
    if empty and not chosen.remembered:
        warn(
            f"Every weight of {some(empty)} is 0, and keep_zeros keeps it so: the layer never "
            "learns. If it was not pruned but only starts at 0, exclude it: "
            f"exclude={empty!r}."
        )
    return FixedMask([p.parameter for p in found], optimizers)
