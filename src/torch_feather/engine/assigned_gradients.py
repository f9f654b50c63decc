"""Gradients that no tensor hook saw: assigned to `.grad`, not computed by a backward pass.

`torch.func.grad`, `vmap` and per-sample gradients differentiate with respect to copies of the
parameters, so tensor hooks on the parameters do not run. Such a gradient is dL/du and must become
dL/dw. Positions, identity and version of tensors tell it apart: nothing is read from a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import devices
from ..errors import StateError, some, warn
from ..weights.shards import local
from .gradients import PullBack, hook_for


class AssignedGradients:
    """Finds gradients that were assigned to `.grad` since the last step.

    A gradient is assigned if no tensor hook of its weight ran since then, and it is a new tensor or
    was written. The gradient of an earlier step is not: it already is dL/dw.

    Args:
        names: names of the weight tensors.

    Example:
        >>> w, assigned = torch.ones(2), AssignedGradients(["w"])
        >>> w.grad = torch.ones(2)
        >>> assigned.find([0], [w])
        [0]
        >>> assigned.settle([0], [w])  # a step
        >>> assigned.find([0], [w])
        []
        >>> _ = w.grad.copy_(torch.zeros(2))
        >>> assigned.find([0], [w])
        [0]
        >>> assigned.hooked(0)  # a backward pass
        >>> assigned.find([0], [w])
        []
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._hooked: set[int] = set()
        self._converted: set[int] = set()
        self._known = WeakIdKeyDictionary()  # gradients that are dL/dw, and their versions
        self._warned = False

    def hooked(self, i: int) -> None:
        """Record that the tensor hook of weight tensor i ran."""
        self._hooked.add(i)

    def find(self, positions: Iterable[int], parameters: Sequence[Tensor]) -> list[int]:
        """Return the positions of assigned gradients.

        Args:
            positions: positions of the weights to examine.
            parameters: all parameters.

        Raises:
            StateError: a weight has both a gradient of a backward pass and per-sample gradients,
                and it is unknown which of them `.grad` is made of.
        """
        found = []
        for i in positions:
            gradient = parameters[i].grad
            if gradient is None or i in self._converted:
                continue
            if self._known.get(gradient) == _version(gradient):
                continue
            if i not in self._hooked or self._is_of_samples(i, parameters[i]):
                found.append(i)
        return found

    def convert(
        self,
        positions: Sequence[int],
        parameters: Sequence[Tensor],
        pull_back: PullBack,
        later_pass: bool = False,
    ) -> None:
        """Turn assigned gradients dL/du into dL/dw, and warn once.

        Args:
            positions: a result of `find`.
            parameters: all parameters, which hold u.
            pull_back: computes dL/dw of local shards.
            later_pass: whether `.grad` also contains gradients of an earlier pass of this step.

        Raises:
            StateError: in a later pass.
        """
        if positions and later_pass:
            raise StateError(
                f"The gradient of {self._names[positions[0]]} was assigned to .grad in one of "
                "several passes. Each pass has masks of its own, so its gradient cannot be "
                "separated from that of the passes before. Use backward(), or one pass per step."
            )
        doubtful = [i for i in positions if _may_be_nonzero(parameters[i])]
        doubtful = [i for i in doubtful if getattr(parameters[i], "grad_sample", None) is None]
        if doubtful and not self._warned:
            self._warned = True
            warn(
                f"The gradients of {some([self._names[i] for i in doubtful])} were assigned to "
                ".grad, not computed by backward(). They are taken as gradients with respect to "
                "the effective weights, as torch.func.grad computes them, and converted before "
                "the step. To clip converted gradients, call sparsifier.complete_gradients() "
                "first. Do not assign gradients that backward() computed in an earlier step: they "
                "would be converted twice."
            )
        for i in positions:
            _pull_back_assigned(i, parameters[i], pull_back)
            self._converted.add(i)

    def settle(self, positions: Iterable[int], parameters: Sequence[Tensor]) -> None:
        """Record that the present gradients are dL/dw, after a step or at the end of a pass.

        Args:
            positions: positions of the weights whose step or pass ended.
            parameters: all parameters.
        """
        positions = list(positions)
        self._hooked.difference_update(positions)
        self._converted.difference_update(positions)
        for i in positions:
            if (gradient := parameters[i].grad) is not None:
                self._known[gradient] = _version(gradient)

    def _is_of_samples(self, i: int, parameter: Tensor) -> bool:
        """Return whether Opacus made the gradient from per-sample gradients, after backward()."""
        if getattr(parameter, "grad_sample", None) is None:
            return False
        if getattr(parameter, "summed_grad", None) is None:
            raise StateError(
                f"{self._names[i]} has per-sample gradients (grad_sample) and a gradient of "
                "backward(). Only the latter is taken back to the latent weights, and it is "
                "unknown which of them .grad contains. Step with DPOptimizer of Opacus, compute "
                "per-sample gradients with torch.func, or use a method that leaves gradients "
                "unchanged, such as feather with theta=1. If .grad is that of backward(), set "
                "grad_sample to None before the step."
            )
        return True


def _version(gradient: Tensor) -> int:
    return -1 if gradient.is_inference() else gradient._version


def _may_be_nonzero(parameter: Tensor) -> bool:
    """Return whether the gradient may have nonzero entries, without synchronizing a device.

    `zero_grad(set_to_none=False)` writes zeros, which are the gradient with respect to anything.
    """
    assert parameter.grad is not None
    gradient = local(parameter.grad).detach()
    if devices.synchronizes(gradient.device) or gradient.is_sparse:
        return True
    return bool(gradient.any())


def _pull_back_assigned(i: int, parameter: Tensor, pull_back: PullBack) -> None:
    """Convert a gradient in place if possible, because other code may hold it as a buffer."""
    gradient = parameter.grad
    assert gradient is not None
    converted = hook_for(i, parameter, pull_back)(gradient)
    part = local(gradient)
    overlaps = part.layout == torch.strided and any(
        size > 1 and stride == 0 for size, stride in zip(part.shape, part.stride(), strict=True)
    )
    if gradient.is_inference() or gradient.is_sparse or overlaps:
        parameter.grad = converted
    else:
        gradient.copy_(converted)
