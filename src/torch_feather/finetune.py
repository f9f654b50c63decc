"""Fine-tuning with a fixed mask: zeros stay zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .engine.copies import FixedMaskCopies
from .engine.wrappers import plain_optimizer
from .errors import ConfigurationError, StateError, some, warn
from .participants import choose
from .prunable import Filters, unwrap
from .weights.counts import count_true
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
        self._versions = [_version(parameter) for parameter in parameters]
        self._known: dict[int, set[int]] = {}
        self._warned = False
        for optimizer in {id(o): o for o in map(plain_optimizer, optimizers)}.values():
            self._known[id(optimizer)] = set(_held(optimizer))
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._refill))
            self._handles.append(FixedMaskCopies(optimizer))

    def _held_by(self, optimizer: Optimizer) -> list[int]:
        """Return the weights of an optimizer; another one may be within the backward pass."""
        held = set(_held(optimizer))
        return [i for i, (parameter, _) in enumerate(self._pruned) if id(parameter) in held]

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        positions = self._held_by(optimizer)
        self._check_replaced(optimizer, positions)
        self._check_written(positions)
        # Gradients that were assigned, such as those of torch.func.grad, called no hook.
        for parameter, mask in (self._pruned[i] for i in positions):
            _clear_gradient(parameter, mask)

    def _check_replaced(self, optimizer: Optimizer, positions: Sequence[int]) -> None:
        """Raise StateError if other parameters took the place of weights with a mask."""
        known = self._known[id(optimizer)]
        due = sum(id(parameter) in known for parameter, _ in self._pruned)
        if len(positions) < due and not known.issuperset(_held(optimizer)):
            raise StateError(
                f"{due - len(positions)} weight tensors with a fixed mask were replaced in this "
                f"{type(optimizer).__name__}, so their zeros would not be kept. Call detach() of "
                "the sparsifier, or remove() of what keep_zeros returned; then call keep_zeros."
            )

    @torch.no_grad()
    def _check_written(self, positions: Sequence[int]) -> None:
        """Warn once if other code wrote values into pruned weights since the last step."""
        if self._warned:
            return
        written = 0
        for i in positions:
            parameter, mask = self._pruned[i]
            if _version(parameter) != self._versions[i]:
                shard = local(parameter)
                written += int(count_true((shard != 0) & mask.to(shard.device)))
        if written:
            self._warned = True
            warn(
                f"Other code wrote {written:,} values into weights that are kept at 0, as "
                "load_state_dict of another model does. They are set to 0 again. To train them, "
                "call detach() of the sparsifier, or remove() of what keep_zeros returned, before "
                "you load a model; then call keep_zeros."
            )

    @torch.no_grad()
    def _refill(self, optimizer: Optimizer, *_: Any) -> None:
        for i in self._held_by(optimizer):
            parameter, mask = self._pruned[i]
            shard = local(parameter)
            shard.masked_fill_(mask.to(shard.device), 0.0)
            self._versions[i] = _version(parameter)

    def remove(self) -> None:
        """Remove the hooks; pruned weights may become nonzero from now on."""
        for handle in self._handles:
            handle.remove()


def _held(optimizer: Optimizer) -> Iterator[int]:
    """Yield the identities of the parameters of an optimizer."""
    return (id(p) for group in optimizer.param_groups for p in group["params"])


def _version(parameter: Tensor) -> int:
    """Return a number that changes with each write into a parameter, if there is one."""
    shard = local(parameter)
    return -1 if shard.is_inference() else shard._version


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


# long: half of it is documentation
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
