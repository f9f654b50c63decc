"""Copies of optimizers: they have no hooks, so their first step raises.

`copy.deepcopy` and pickle take what `__getstate__` returns. A copy gets the latent weights, as a
state that was loaded before `sparsify`, and one of these guards. `sparsify` removes it. So do
`keep_zeros` and a fixed mask, of which a copy has nothing but a guard.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any, NoReturn

from ..errors import StateError
from .wrappers import has_step_hooks


class NotPickled:
    """A base of objects that belong to the optimizers of one process; pickling one raises.

    Copies by `copy.deepcopy` are possible, because frameworks copy what a model's class holds.

    Example:
        >>> import pickle
        >>> try:
        ...     pickle.dumps(NotPickled())
        ... except StateError as error:
        ...     print(error)
        A NotPickled cannot be pickled: it belongs to optimizers of this process. Save ...
    """

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise StateError(
            f"A {type(self).__name__} cannot be pickled: it belongs to optimizers of this process. "
            "Save the state dicts of model and optimizer, which contain its state (that of a "
            "LatentAverage is separate). To continue elsewhere, call sparsify with the same "
            "arguments, then load them."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


class CopyGuard:
    """Raises in the first step of a copied optimizer; a step hook, or in place of `step`.

    Args:
        name: class of the optimizer.
        fixed: whether the original has a fixed mask, and no sparsifier.

    Example:
        >>> try:
        ...     CopyGuard("SGD")()
        ... except StateError as error:
        ...     print(str(error)[:34])
        This SGD is a copy of an optimizer
    """

    def __init__(self, name: str, fixed: bool = False):
        self._name, self._fixed = name, fixed

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise StateError."""
        if self._fixed:
            raise StateError(
                f"This {self._name} is a copy of an optimizer with a fixed mask and has none "
                "itself, so it would train pruned weights too. Call keep_zeros with the copied "
                "model and this copy. To train it dense, create a new optimizer."
            )
        raise StateError(
            f"This {self._name} is a copy of an optimizer with a sparsifier and has none itself, "
            "so it would train all weights dense. Call sparsify with the copied model, this copy "
            "and the same arguments: training continues from the latent weights and the step that "
            "the copy holds. To train it dense, create a new optimizer."
        )


class FixedMaskCopies:
    """Marks copies of an optimizer with a fixed mask, until `remove`.

    Args:
        optimizer: the optimizer.

    Example:
        >>> import copy, torch
        >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
        >>> copies = FixedMaskCopies(optimizer)
        >>> try:
        ...     copy.deepcopy(optimizer).step()
        ... except StateError as error:
        ...     print(str(error)[:34])
        This SGD is a copy of an optimizer
        >>> copies.remove()
        >>> copy.deepcopy(optimizer).step()
    """

    def __init__(self, optimizer: Any):
        forget_copy(optimizer)
        self._marks = True
        self._optimizer, self._before = optimizer, optimizer.__dict__.get("__getstate__")
        original = optimizer.__getstate__

        def getstate(_: Any) -> Any:
            state = original()
            if self._marks and isinstance(state, dict):
                state = {key: value for key, value in state.items() if key != "__getstate__"}
                mark_copy(optimizer, state, fixed=True)
            return state

        self._own = types.MethodType(getstate, optimizer)
        optimizer.__dict__["__getstate__"] = self._own

    def remove(self) -> None:
        """Mark no more copies."""
        self._marks = False
        own = self._optimizer.__dict__
        if own.get("__getstate__") is self._own:
            del own["__getstate__"]
            if self._before is not None:
                own["__getstate__"] = self._before


def mark_copy(optimizer: Any, state: dict[str, Any], fixed: bool = False) -> None:
    """Add a guard to the state of which a copy is made.

    Args:
        optimizer: the optimizer that is copied.
        state: the result of its `__getstate__`, which is changed.
        fixed: whether it has a fixed mask, and no sparsifier.

    Example:
        >>> import torch
        >>> state = {}
        >>> mark_copy(torch.optim.SGD([torch.ones(2)], lr=0.1), state)
        >>> list(state)
        ['_optimizer_step_pre_hooks']
    """
    guard = CopyGuard(type(optimizer).__name__, fixed)
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
