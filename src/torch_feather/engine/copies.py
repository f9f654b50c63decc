"""Copies of optimizers: they have no hooks, so their first step raises.

`copy.deepcopy` and pickle take what `__getstate__` returns. A copy gets the latent weights, as a
state that was loaded before `sparsify`, and one of these guards. `sparsify` removes it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NoReturn

from ..errors import StateError
from .wrappers import has_step_hooks


class CopyGuard:
    """Raises in the first step of a copied optimizer; a step hook, or in place of `step`.

    Args:
        name: class of the optimizer.

    Example:
        >>> try:
        ...     CopyGuard("SGD")()
        ... except StateError as error:
        ...     print(str(error)[:34])
        This SGD is a copy of an optimizer
    """

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise StateError."""
        raise StateError(
            f"This {self._name} is a copy of an optimizer with a sparsifier and has none itself, "
            "so it would train all weights dense. Call sparsify with the copied model, this copy "
            "and the same arguments: training continues from the latent weights and the step that "
            "the copy holds. To train it dense, create a new optimizer."
        )


def mark_copy(optimizer: Any, state: dict[str, Any]) -> None:
    """Add a guard to the state of which a copy is made.

    Args:
        optimizer: the optimizer that is copied.
        state: the result of its `__getstate__`, which is changed.

    Example:
        >>> import torch
        >>> state = {}
        >>> mark_copy(torch.optim.SGD([torch.ones(2)], lr=0.1), state)
        >>> list(state)
        ['_optimizer_step_pre_hooks']
    """
    guard = CopyGuard(type(optimizer).__name__)
    if has_step_hooks(optimizer):
        state["_optimizer_step_pre_hooks"] = OrderedDict({-1: guard})
    else:
        state["step"] = guard


def forget_copy(optimizer: Any) -> None:
    """Remove the guard of a copy.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> mark_copy(optimizer, optimizer.__dict__)
        >>> forget_copy(optimizer)
        >>> optimizer.step()
    """
    hooks = optimizer.__dict__.get("_optimizer_step_pre_hooks", {})
    for key in [key for key, hook in hooks.items() if isinstance(hook, CopyGuard)]:
        del hooks[key]
    if isinstance(optimizer.__dict__.get("step"), CopyGuard):
        del optimizer.__dict__["step"]
