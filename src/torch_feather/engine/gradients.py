"""Whether gradients came that are yet to be completed: each is completed once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Arrivals:
    """Gradients come through autograd, which tells, or are put into `.grad` by hand."""

    def __init__(self) -> None:
        self._told = False
        self._completed = False
        self._spent = WeakIdKeyDictionary()  # gradients of the last step, and their versions

    def note(self) -> bool:
        """One arrives; returns whether it makes void what was completed."""
        void, self._told, self._completed = self._completed, True, False
        return void

    def complete(self) -> None:
        """All that came are completed, whatever is done with them until the step."""
        self._told, self._completed = False, True

    def spend(self, parameters: Iterable[Tensor]) -> None:
        """The step is taken: a further one on the same gradients has nothing to complete."""
        self._spent = WeakIdKeyDictionary()
        for gradient in _gradients(parameters):
            self._spent[gradient] = gradient._version
        self._told = self._completed = False

    def are_due(self, parameters: Iterable[Tensor]) -> bool:
        """Whether some came since, and are not completed."""
        if self._completed or self._told:
            return self._told
        return any(self._spent.get(g) != g._version for g in _gradients(parameters))


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
