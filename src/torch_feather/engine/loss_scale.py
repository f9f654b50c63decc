"""GradScaler where several optimizers step one after another.

`scaler.step(optimizer)` divides the gradients of this optimizer by the scale, and leaves those of
the next as they are. Methods that complete gradients need those of all in one scale, before the
first step: so the scaler is asked to divide the others' then, as a loop may do itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from ..errors import StateError


def unscale_others(optimizer: Optimizer, others: Iterable[Optimizer]) -> None:
    """Brings the gradients of the others to the scale of those of `optimizer`, which steps now.

    Raises:
        StateError: it cannot be, as a fused optimizer is yet to divide by the scale itself.
    """
    others = list(others)
    scaler = _caller() if others else None
    if scaler is None or not scaler.is_enabled():
        return
    divides_itself = getattr(optimizer, "grad_scale", None) is not None
    for other in others:
        divided = scaler._per_optimizer_states[id(other)]["stage"] is not OptState.READY
        if divides_itself and divided:
            raise StateError(
                f"Of several optimizers, {type(other).__name__} was unscaled before the step of "
                f"{type(optimizer).__name__}, and this one was not: the method completes gradients "
                "of all weights together, which must be of one scale. Call scaler.unscale_ on "
                "every optimizer before the first step, or on none."
            )
        if not divides_itself and not divided:
            scaler.unscale_(other)


def _caller() -> GradScaler | None:
    """The scaler whose `step` led here; it tells an optimizer that is not fused nothing of it."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "step":
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, GradScaler):
                return scaler
        frame = frame.f_back  # type: ignore[assignment]
    return None
