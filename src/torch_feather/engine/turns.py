"""Schedules that end too early or never, as steps were counted that the user did not mean.

The schedule counts the steps of the last optimizer that was passed to `sparsify`, and so does
`total_steps`. The optimizers of a GAN step unequally often, for example. Some frameworks create
model and optimizer again, so no step of the first ones is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import StateError


def unequal(names: Sequence[str], steps: Sequence[int]) -> str:
    """Return a sentence about optimizers that step unequally often; '' if they do not.

    A GradScaler may skip some steps of one optimizer, so small differences do not count.

    Args:
        names: classes of the optimizers.
        steps: the number of steps of each.

    Example:
        >>> unequal(["SGD", "Adam"], [2, 10])
        'The optimizers step unequally often: SGD (0) 2 times, Adam (1) 10 times.'
        >>> unequal(["SGD", "Adam"], [9, 10])
        ''
    """
    if len(steps) < 2 or 3 * min(steps) >= 2 * max(steps):
        return ""
    pairs = zip(names, steps, strict=True)
    found = [f"{name} ({number}) {n} times" for number, (name, n) in enumerate(pairs)]
    return f"The optimizers step unequally often: {', '.join(found)}."


COUNTED = (
    " total_steps counts the steps of the last optimizer that was passed to sparsify. Pass the "
    "optimizer whose steps you count last, such as that of a GAN's generator."
)


def surplus(counts: str, total_steps: int) -> StateError:
    """Return the error for a step beyond `total_steps` of optimizers that step unequally often.

    Args:
        counts: result of `unequal`.
        total_steps: optimizer steps of the whole training.

    Example:
        >>> "all of its 10 steps" in str(surplus("", 10))
        True
    """
    return StateError(
        f"The schedule has taken all of its {total_steps} steps, and this is one more. {counts}"
        f"{COUNTED} Or set total_steps to the number of steps of the last one."
    )


NO_STEPS = (
    " No step of the optimizer that was passed to sparsify was taken. Some frameworks create model "
    "or optimizer again when training begins, or step an optimizer of their own: call sparsify "
    "afterwards, on those that are trained. See docs/integrations.md."
)


def not_reached(steps: int, total: int, sparsity: float, target: Any, counts: str) -> StateError:
    """Return the error for the end of a training run that has not reached its target.

    Args:
        steps: steps that were taken.
        total: `total_steps`.
        sparsity: the sparsity now.
        target: the target.
        counts: result of `unequal`.

    Example:
        >>> str(not_reached(0, 8, 0.0, 0.9, "")).split(". ")[2]
        'No step of the optimizer that was passed to sparsify was taken'
    """
    reason = NO_STEPS if steps == 0 else f" {counts}{COUNTED}" if counts else ""
    return StateError(
        f"After {steps} of {total} steps the sparsity is {sparsity:.4f}, not yet {target}. "
        f"Continue training, or keep the model as it is: finalize(force=True).{reason}"
    )
