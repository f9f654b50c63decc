"""GradScaler with several optimizers that step one after another.

`scaler.step(optimizer)` divides the gradients of this optimizer alone by the loss scale. Methods
that complete gradients need all of them at one scale before the first step. So before this step the
scaler unscales the other optimizers too, as `scaler.unscale_` in a loop would do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from ..errors import StateError

_stepping: ContextVar[GradScaler | None] = ContextVar("stepping", default=None)


def watch_scalers() -> None:
    """Let `unscale_others` find the GradScaler that calls an optimizer's step.

    GradScaler has no hooks, and passes itself to fused optimizers alone. So `GradScaler.step` is
    wrapped, once per process, when this is first needed.

    Example:
        >>> watch_scalers()
        >>> GradScaler.step.is_watched
        True
    """
    # `_maybe_opt_step` is called by subclasses with a step of their own, too.
    for name in ("step", "_maybe_opt_step"):
        method = getattr(GradScaler, name)
        if not hasattr(method, "is_watched"):
            setattr(GradScaler, name, _watched(method))


def _watched(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of GradScaler that records the scaler while it runs."""

    @functools.wraps(method)
    def watched(self: GradScaler, *args: Any, **kwargs: Any) -> Any:
        token = _stepping.set(self)
        try:
            return method(self, *args, **kwargs)
        finally:
            _stepping.reset(token)

    watched.is_watched = True  # type: ignore[attr-defined]
    return watched


def unscale_others(optimizer: Optimizer, others: Iterable[Optimizer]) -> None:
    """Bring the gradients of other optimizers to the scale of those of `optimizer`.

    Without an active GradScaler, it does nothing.

    Args:
        optimizer: the optimizer that steps now.
        others: the optimizers that step later.

    Raises:
        StateError: `optimizer` is fused, so it divides by the scale itself, later, and another
            optimizer is already unscaled.

    Example:
        >>> import torch
        >>> first, second = (torch.optim.SGD([torch.ones(1)], lr=0.1) for _ in range(2))
        >>> unscale_others(first, [second])
    """
    others = list(others)
    scaler = _stepping.get() if others else None
    if scaler is None or not scaler.is_enabled():
        return
    divides_itself = getattr(optimizer, "grad_scale", None) is not None
    for other in others:
        divided = scaler._per_optimizer_states[id(other)]["stage"] is not OptState.READY
        if divides_itself and divided:
            raise StateError(
                f"{type(other).__name__} was unscaled before the step of "
                f"{type(optimizer).__name__}, which was not. The method completes the gradients of "
                "all weights together, so they must have one scale. Call scaler.unscale_ on every "
                "optimizer before the first step, or on none."
            )
        if not divides_itself and not divided:
            scaler.unscale_(other)
