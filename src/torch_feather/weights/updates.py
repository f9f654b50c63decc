"""A latent update on the weights of one optimizer step, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import devices
from ..latent_updates import LatentUpdate
from ..threads import for_each
from .latent import DEVICE_BLOCK, LatentWeights, flat_bits, flat_of, same_layout, write_if
from .ranges import arrays, ranges, wide_array
from .runs import joined, joint, runs


class PendingUpdate(NamedTuple):
    """A latent update, with the gradients and learning rates of one optimizer step.

    Example:
        >>> from torch_feather.latent_updates import HAM
        >>> weights = LatentWeights([torch.tensor([1.0, -1.0])])
        >>> PendingUpdate(HAM(1.0, 0.0), [torch.ones(2)], [0.1], True).apply(weights, [0])
        >>> weights.views[0]
        tensor([ 0.9048, -1.1052])
    """

    update: LatentUpdate
    gradients: Sequence[Tensor | None]
    """dL/dw of each weight tensor, its local shard; None without a gradient."""
    rates: Sequence[float | Tensor]
    """Learning rate of each weight tensor."""
    taken: bool | Tensor
    """Whether the step was taken; a tensor if only the device knows. If not, nothing changes."""

    def apply(self, weights: LatentWeights, positions: Sequence[int]) -> None:
        """Update the weights at these positions in place.

        On a CPU the work is done range by range, on a device in runs of at most `DEVICE_BLOCK`
        weights. So temporary memory is small, and a device gets few operations.

        Args:
            weights: the latent weights.
            positions: positions of the weight tensors whose optimizer took the step.
        """
        if devices.synchronizes(weights.device):
            self._on_device(weights, positions)
            return
        change = self.on_ranges(weights, positions)
        if change is not None:
            for_each(change, range(len(ranges(weights).size)))
            increment_version(weights.flats)

    def on_ranges(
        self, weights: LatentWeights, positions: Sequence[int]
    ) -> Callable[[int], None] | None:
        """Return a function that updates one of the `ranges`, on a CPU; None if nothing changes.

        It does not increment the versions of the latent weights.

        Args:
            weights: the latent weights.
            positions: as for `apply`.
        """
        chosen = {i: gradient for i in positions if (gradient := self.gradients[i]) is not None}
        if not self.taken or not chosen:
            return None
        views, wide, found = weights.views, weights.wide, ranges(weights)
        flat = {i: flat_bits(_in_layout(gradient, views[i])) for i, gradient in chosen.items()}
        rates, latent = {i: float(self.rates[i]) for i in flat}, arrays(weights, views)

        def change(j: int) -> None:
            i, start, size = (int(x[j]) for x in (found.position, found.start, found.size))
            if i not in flat:
                return
            dtype, bits = views[i].dtype, latent[j]
            w = wide_array(bits, dtype, wide)
            gradient = wide_array(flat[i][start : start + size], dtype, wide)
            self.update.write(w, gradient, rates[i])
            if dtype != wide:  # `w` is a copy
                torch.from_numpy(bits).view(dtype).copy_(torch.from_numpy(w))

        return change

    def _on_device(self, weights: LatentWeights, positions: Sequence[int]) -> None:
        """Update without a host read, with few operations for all tensors of one rate."""
        held: dict[int, Tensor] = {
            i: gradient for i in positions if (gradient := self.gradients[i]) is not None
        }
        of_rate: dict[float | int, list[int]] = {}
        for i in held:
            rate = self.rates[i]
            of_rate.setdefault(id(rate) if isinstance(rate, Tensor) else rate, []).append(i)
        for members in of_rate.values():
            rate = self.rates[members[0]]
            for run in runs(weights, members):
                for w, gradient in _pieces(joint(weights, run), joined(weights, run, held)):
                    new = self.update(w.to(weights.wide), gradient.to(weights.wide), rate)
                    write_if(self.taken, [w], [new.to(w.dtype)])


def _in_layout(gradient: Tensor, view: Tensor) -> Tensor:
    """Return a gradient in the type and layout of its weights."""
    if gradient.dtype == view.dtype and same_layout(gradient, view):
        return gradient
    return torch.empty_like(view).copy_(gradient)


def _pieces(w: Tensor, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weights and gradients in pieces of at most `DEVICE_BLOCK`, if they have one layout."""
    if w.numel() <= DEVICE_BLOCK or not same_layout(w, gradient):
        yield w, gradient
        return
    yield from zip(
        flat_of(w).split(DEVICE_BLOCK), flat_of(gradient).split(DEVICE_BLOCK), strict=True
    )
