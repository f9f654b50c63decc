"""What the engine looks for while it trains: NaN, layers that lost every weight, zeros by chance.

Nothing here makes the host wait for a device: there, what is counted is read when it has arrived.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import devices
from ..errors import FILL_LAYERS, NonFiniteWeightError, some, warn
from ..methods.base import Reparametrization
from ..weights.latent import LatentWeights

# Steps between two looks at what costs a pass over the weights, or a transfer, to look at.
POLL = 100


class Health:
    """Watches over the weights of one training.

    Args:
        names: of the weight tensors.
        total_steps: of the whole training.
    """

    def __init__(self, names: Sequence[str], total_steps: int) -> None:
        self._names = names
        self._total_steps = total_steps
        self._steps = 0  # seen here, those of before a restart not among them
        self._warned: set[str] = set()
        self._awaited: tuple[Tensor, torch.cuda.Event] | None = None

    def look(
        self,
        weights: LatentWeights,
        here: Sequence[Tensor],
        method: Reparametrization,
        step: Tensor,
        total: Tensor,
    ) -> None:
        """Raises for NaN and warns of empty layers, after a step.

        Args:
            weights: the latent weights.
            here: what this process holds of the parameters, which hold the image.
            method: what made the image.
            step: steps taken so far; on a device it is not read.
            total: the sum of the whole image: not finite if one of it is NaN.
        """
        self._steps += 1
        if not devices.synchronizes(weights.device):
            if not weights.common(total).isfinite() or _count_broken(weights, method):
                self.raise_if_nan(weights, here, method)
            if self._steps % POLL == 0 or int(step) in (method.arrival, self._total_steps):
                self.inspect(weights, here, method)
        elif not torch.cuda.is_current_stream_capturing():
            if self._awaited is None and self._steps % POLL == 0:
                with torch.cuda.device(weights.device):
                    counts = _counts(weights, here, method)
                    pinned = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
                    event = torch.cuda.Event()
                    pinned.copy_(counts, non_blocking=True)
                    event.record()
                self._awaited = pinned, event
            elif self._awaited is not None and self._has_arrived(weights, self._awaited[1]):
                counts, self._awaited = self._awaited[0], None
                self._tell(weights, here, method, counts)

    def inspect(
        self, weights: LatentWeights, here: Sequence[Tensor], method: Reparametrization
    ) -> None:
        """Looks at once, waiting for a device where need be."""
        self._tell(weights, here, method, _counts(weights, here, method).cpu())

    def raise_if_nan(
        self,
        weights: LatentWeights,
        here: Sequence[Tensor],
        method: Reparametrization | None = None,
    ) -> None:
        """Raises NonFiniteWeightError with the names of weights, or thresholds, that are NaN."""
        advice = "Lower the learning rate, clip gradients, or go back to a checkpoint."
        broken = None if method is None else method.broken(weights)
        names = [] if broken is None else self._where(broken)
        if names and not self._where(_count_nan(weights, weights.views)):
            raise NonFiniteWeightError(
                f"The learned thresholds of {some(names)} are not finite, as a weight or a "
                f"gradient there was not: these layers cannot be pruned. {advice}"
            )
        if names := self._where(_count_nan(weights, here)):
            raise NonFiniteWeightError(
                f"Weights of {some(names)} are NaN. They are kept in the network, so that its loss "
                f"shows them. {advice}"
            )

    def _where(self, found: Tensor) -> list[str]:
        return [name for name, n in zip(self._names, found.tolist(), strict=True) if n]

    def _has_arrived(self, weights: LatentWeights, event: torch.cuda.Event) -> bool:
        """Whether what was counted lies on the host; on shards all ranks must look at one time."""
        if weights.shards is None:
            return event.query()
        if self._steps % POLL != POLL // 2:
            return False
        event.synchronize()
        return True

    def _tell(
        self,
        weights: LatentWeights,
        here: Sequence[Tensor],
        method: Reparametrization,
        counts: Tensor,
    ) -> None:
        nan, zeros, *kept = counts.tolist()
        if nan:
            self.raise_if_nan(weights, here, method)
        for name, left in zip(self._names, kept, strict=True):
            if left == 0 and name not in self._warned:
                self._warned.add(name)
                warn(
                    f"Every weight of {name} is pruned, so the layer gives nothing but its "
                    f"bias. {FILL_LAYERS}"
                )
        if zeros > 0 and "" not in self._warned:
            self._warned.add("")
            warn(
                f"{zeros} latent weights that should be kept are exactly 0: the network has more "
                "zeros than asked for. Initialise these weights, or leave them out (exclude=)."
            )


@torch.no_grad()
def _counts(weights: LatentWeights, here: Sequence[Tensor], method: Reparametrization) -> Tensor:
    """Weights and thresholds that are NaN, kept weights that are 0, and kept ones of each layer."""
    nan = _count_nan(weights, here).sum() + _count_broken(weights, method)
    zero = weights.total(torch.stack([(part == 0).sum() for part in here])).sum()
    pruned = method.counts_pruned(weights)
    return torch.cat([torch.stack([nan, zero - pruned.sum()]), weights.sizes - pruned])


def _count_nan(weights: LatentWeights, here: Sequence[Tensor]) -> Tensor:
    """NaN in each weight tensor, in whichever copy of it."""
    return weights.common(torch.stack([part.isnan().sum() for part in here]))


def _count_broken(weights: LatentWeights, method: Reparametrization) -> Tensor | int:
    """Weight tensors for which the method learned what is not finite."""
    broken = method.broken(weights)
    return 0 if broken is None else broken.sum()
