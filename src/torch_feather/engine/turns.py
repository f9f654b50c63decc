"""Schedules that end too early or never, as steps were counted that the user did not mean.

The schedule counts the steps of the last optimizer that was passed to `sparsify`, and so does
`total_steps`. The optimizers of a GAN step unequally often, for example. Some frameworks create
model and optimizer again, so no step of the first ones is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import StateError


class Turns:
    """Counts the steps of each optimizer in this process.

    Args:
        names: classes of the optimizers.
        holds: whether each optimizer holds prunable weights.
        total_steps: optimizer steps of the whole training.

    Example:
        >>> turns = Turns(["SGD", "Adam"], [True, True], 10)
        >>> for number in (0, 0, 1, 1, 1, 1, 1):
        ...     turns.add(number)
        >>> turns.unequal()
        'The optimizers step unequally often: SGD (0) 2 times, Adam (1) 5 times.'
        >>> for _ in range(2):
        ...     turns.add(0)
        >>> turns.unequal()
        ''
    """

    def __init__(self, names: Sequence[str], holds: Sequence[bool], total_steps: int):
        self._names, self._holds, self._total = names, holds, total_steps
        self._steps = [0] * len(names)

    def add(self, number: int, taken: bool = True) -> None:
        """Count a step of an optimizer, if it was taken."""
        self._steps[number] += taken

    def unequal(self) -> str:
        """Return a sentence about optimizers that step unequally often; '' if they do not.

        Optimizers without prunable weights count only if they are the last one. A GradScaler may
        skip some steps of one optimizer, so small differences do not count.
        """
        last = len(self._names) - 1
        counted = [o for o, holds in enumerate(self._holds) if holds or o == last]
        steps = [self._steps[o] for o in counted]
        if len(steps) < 2 or 3 * min(steps) >= 2 * max(steps):
            return ""
        pairs = [f"{self._names[o]} ({n}) {self._steps[o]} times" for n, o in enumerate(counted)]
        return f"The optimizers step unequally often: {', '.join(pairs)}."

    def check(self, count: Tensor) -> None:
        """Raise for a step beyond `total_steps` if another order of the optimizers was meant.

        Args:
            count: optimizer steps taken, 0-dimensional. The host reads it if steps are unequal.

        Raises:
            StateError: the last optimizer steps again, and others have stepped less often.
        """
        last = self._steps[-1]
        if last < 2 or not (counts := self.unequal()):
            return
        least = min(n for n, holds in zip(self._steps, self._holds, strict=True) if holds)
        if least < last and int(count) >= self._total:
            raise surplus(counts, self._total)


COUNTED = (
    " total_steps counts the steps of the last optimizer that was passed to sparsify. Pass the "
    "optimizer whose steps you count last, such as that of a GAN's generator."
)


def surplus(counts: str, total_steps: int) -> StateError:
    """Return the error for a step beyond `total_steps` of optimizers that step unequally often.

    Args:
        counts: result of `Turns.unequal`.
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
        counts: result of `Turns.unequal`.

    Example:
        >>> str(not_reached(0, 8, 0.0, 0.9, "")).split(". ")[2]
        'No step of the optimizer that was passed to sparsify was taken'
    """
    reason = NO_STEPS if steps == 0 else f" {counts}{COUNTED}" if counts else ""
    return StateError(
        f"After {steps} of {total} steps the sparsity is {sparsity:.4f}, not yet {target}. "
        f"Continue training, or keep the model as it is: finalize(force=True).{reason}"
    )
