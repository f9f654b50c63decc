"""Entries in an optimizer's live state: of a state dict that was loaded before `sparsify`."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from .checkpoint import PREFIX, own_entries, parameters_of


def take_live_entries(optimizer: Optimizer) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Return the added entries in an optimizer's live state, by (group, position).

    They are there if a state dict was loaded before `sparsify` was called.

    Example:
        >>> import torch
        >>> take_live_entries(torch.optim.SGD([torch.ones(2)], lr=0.1))
        {}
    """
    found = {}
    for g, i, parameter in parameters_of(optimizer):
        own = own_entries(optimizer.state.get(parameter, {}))
        if own:
            found[g, i] = own
    return found


def drop_live_entries(optimizer: Optimizer) -> None:
    """Remove the added entries from an optimizer's live state.

    Optimizers initialize the state of a parameter only if it is empty, so no entry may be left.

    Example:
        >>> import torch
        >>> w = torch.ones(2)
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> optimizer.state[w] = {"feather_latent": torch.ones(2)}
        >>> drop_live_entries(optimizer)
        >>> len(optimizer.state)
        0
    """
    for _, _, parameter in parameters_of(optimizer):
        entries = optimizer.state.get(parameter, {})
        own = own_entries(entries)
        for name in own:
            del entries[PREFIX + name]
        if own and not entries:
            del optimizer.state[parameter]
