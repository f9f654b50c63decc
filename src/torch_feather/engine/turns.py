"""Several optimizers that step unequally often, such as those of a GAN.

The schedule counts the steps of the last optimizer that was passed to `sparsify`, and so does
`total_steps`. If another one was meant, the schedule ends too early or never.
"""

from __future__ import annotations

from collections.abc import Sequence

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
