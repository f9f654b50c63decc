"""Records of recurrent layers, whose states change with each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .steps import Recurrence


class RecurrentRecords:
    """The records of a recurrent layer, whose states change with each call.

    Args:
        step: the step.
        records: one for each direction.

    Example:
        >>> from torch.fx import Graph
        >>> from .kernels import RECURRENCE
        >>> from .planes import PlaneLayout, Planes
        >>> planes = Planes(PlaneLayout(1, 7), 8, 1, 7, (7, 8), linear=True)
        >>> x = Graph().placeholder("x")
        >>> step = Recurrence(x, "lstm", (), (), planes, (), 0, 1, 7, True)
        >>> RecurrentRecords(step, np.zeros(0, RECURRENCE)).final([torch.ones(2, 3, 4)])[1].shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, step: Recurrence, records: np.ndarray) -> None:
        self.step, self.records = step, records

    def set_initial(self, states: Sequence[Tensor]) -> None:
        """Set the initial states: tensors (layers · directions, batch, units)."""
        self._set("initial", states)

    def final(self, states: Sequence[Tensor], value: Any = None) -> Any:
        """Set where the final states are written to.

        Args:
            states: the initial states.
            value: what the first layer returned.

        Returns:
            The value of the node: None for the result, and the final states.
        """
        value = value or (None, *(torch.empty(x.shape, dtype=torch.float32) for x in states))
        self._set("final", value[1:])
        return value

    def _set(self, kind: str, states: Sequence[Tensor]) -> None:
        first = self.step.number * len(self.records)
        for name, state in zip("hc", states, strict=False):
            direction, sample, unit = state.stride()
            for i, record in enumerate(self.records):
                record[f"{name}_{kind}"] = state.data_ptr() + 4 * (first + i) * direction
                record[f"{name}_{kind}_sample"], record[f"{name}_{kind}_unit"] = sample, unit
