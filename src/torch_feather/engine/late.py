"""Weights that begin to train after `sparsify`, and so train dense: a warning names them."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from ..errors import some, warn
from ..prunable import Filters, find_prunable
from .binding import Binding


class LateWeights:
    """Notices prunable weights that are added to an optimizer, or no longer frozen.

    Args:
        model: the model.
        binding: its prunable weights.
        filters: include and exclude, as for `find_prunable`.

    Example:
        >>> import torch
        >>> from torch_feather import sparsify
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> _ = model[0].requires_grad_(False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> binding = sparsify(model, optimizer, sparsity=0.5, total_steps=2).step.training.binding
        >>> late = LateWeights(model, binding, (None, None))
        >>> _ = model[0].requires_grad_(True)
        >>> late.find(optimizer)
        ['0.weight']
    """

    def __init__(self, model: nn.Module, binding: Binding, filters: tuple[Filters, Filters]):
        self._model, self._binding, self._filters = model, binding, filters
        self._counts = [_count(optimizer) for optimizer in binding.optimizers]
        self._told: set[str] = set()
        self._frozen = self._find_frozen()

    def _find_frozen(self) -> list[nn.Parameter]:
        found = [item.parameter for item in find_prunable(self._model, *self._filters)]
        return [parameter for parameter in found if not parameter.requires_grad]

    def find(self, optimizer: Optimizer) -> list[str]:
        """Return the names of weights that an optimizer trains dense since the last call.

        Args:
            optimizer: one of the optimizers of the binding.
        """
        number = next(i for i, one in enumerate(self._binding.optimizers) if one is optimizer)
        count = _count(optimizer)
        thawed = [parameter for parameter in self._frozen if parameter.requires_grad]
        if count == self._counts[number] and not thawed:
            return []
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if count == self._counts[number] and held.isdisjoint(map(id, thawed)):
            return []
        self._counts[number], self._frozen = count, self._find_frozen()
        bound = set(map(id, self._binding.parameters))
        late = [
            item.name
            for item in find_prunable(self._model, *self._filters, frozen=False)
            if id(item.parameter) in held - bound and item.name not in self._told
        ]
        self._told.update(late)
        return late

    def warn(self, optimizer: Optimizer) -> None:
        """Warn of weights that an optimizer trains dense; once for each."""
        if late := self.find(optimizer):
            warn(
                f"{some(late)} was added to the optimizer after sparsify, or was frozen then, so "
                "it is trained dense. To prune it, add all parameter groups before calling "
                "sparsify, and call requires_grad_(True) before it."
            )


def _count(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
