"""Checks during training: NaN, layers without weights, unexpected zeros.

On an accelerator, `check` does not synchronize the host. It copies counts asynchronously, and reads
them in a later step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import devices
from ..errors import FILL_LAYERS, NonFiniteWeightError, some, warn
from ..methods.base import BoundMethod, Pruning
from ..weights.latent import LatentWeights

# Steps between two checks that need a pass over the weights, or a copy to the host.
POLL = 100


class Health:
    """Checks the weights of one training run.

    Args:
        names: names of the weight tensors.
        total_steps: optimizer steps of the whole training.

    Example:
        >>> w = torch.tensor([1.0, torch.nan])
        >>> try:
        ...     Health(["w"], 100).raise_if_nan(LatentWeights([w]), [w])
        ... except NonFiniteWeightError as error:
        ...     print(str(error)[:20])
        Weights of w are NaN
    """

    def __init__(self, names: Sequence[str], total_steps: int) -> None:
        self._names = names
        self._total_steps = total_steps
        self._steps = 0  # since the start of this process
        self._warned: set[str] = set()
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def check(
        self,
        weights: LatentWeights,
        local: Sequence[Tensor],
        method: BoundMethod,
        pruning: Pruning,
        step: Tensor,
    ) -> None:
        """Raise for NaN and warn of empty layers, after a step.

        Args:
            weights: the latent weights.
            local: local shards of the parameters, which hold effective weights.
            method: the method.
            pruning: the pruning of this step.
            step: optimizer steps taken; on an accelerator the host does not read it.

        Raises:
            NonFiniteWeightError: weights or learned thresholds are NaN.
        """
        self._steps += 1
        if not devices.synchronizes(weights.device):
            total = torch.stack([part.sum(dtype=weights.wide) for part in local]).sum()
            if not weights.common(total).isfinite() or not _learned_finite(method):
                self.raise_if_nan(weights, local, method, pruning)
            if self._steps % POLL == 0 or int(step) in (method.target_step, self._total_steps):
                self.inspect(weights, local, method, pruning)
        elif not torch.cuda.is_current_stream_capturing():
            if self._pending is None and self._steps % POLL == 0:
                with torch.cuda.device(weights.device):
                    counts = _counts(weights, local, method, pruning)
                    pinned = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
                    event = torch.cuda.Event()
                    pinned.copy_(counts, non_blocking=True)
                    event.record()
                self._pending = pinned, event
            elif self._pending is not None and self._is_copied(weights, self._pending[1]):
                counts, self._pending = self._pending[0], None
                self._report(weights, local, method, pruning, counts)

    def inspect(
        self,
        weights: LatentWeights,
        local: Sequence[Tensor],
        method: BoundMethod,
        pruning: Pruning,
    ) -> None:
        """Check at once, which synchronizes the host; arguments and errors as for `check`."""
        counts = _counts(weights, local, method, pruning).cpu()
        self._report(weights, local, method, pruning, counts)

    def raise_if_nan(
        self,
        weights: LatentWeights,
        local: Sequence[Tensor],
        method: BoundMethod | None = None,
        pruning: Pruning = None,
    ) -> None:
        """Raise if weights or learned thresholds are NaN; arguments as for `check`.

        Raises:
            NonFiniteWeightError: names the weight tensors.
        """
        advice = "Lower the learning rate, clip gradients, or resume from an earlier checkpoint."
        broken = None if method is None else _broken(weights, method, pruning)
        names = [] if broken is None else self._named(broken)
        if names and not self._named(_count_nan(weights, weights.views)):
            raise NonFiniteWeightError(
                f"The learned thresholds of {some(names)} are not finite, because a weight or a "
                f"gradient was not. These layers cannot be pruned. {advice}"
            )
        if names := self._named(_count_nan(weights, local)):
            raise NonFiniteWeightError(
                f"Weights of {some(names)} are NaN. They are kept in the network, so that its loss "
                f"shows them. {advice}"
            )

    def _named(self, found: Tensor) -> list[str]:
        """Return the names of the weight tensors with a nonzero entry."""
        return [name for name, n in zip(self._names, found.tolist(), strict=True) if n]

    def _is_copied(self, weights: LatentWeights, event: torch.cuda.Event) -> bool:
        """Return whether the counts are on the host; with shards, the same on all ranks."""
        if weights.shards is None:
            return event.query()
        if self._steps % POLL != POLL // 2:
            return False
        event.synchronize()
        return True

    def _report(
        self,
        weights: LatentWeights,
        local: Sequence[Tensor],
        method: BoundMethod,
        pruning: Pruning,
        counts: Tensor,
    ) -> None:
        nan, zeros, *kept = counts.tolist()
        if nan:
            self.raise_if_nan(weights, local, method, pruning)
        for name, left in zip(self._names, kept, strict=True):
            if left == 0 and name not in self._warned:
                self._warned.add(name)
                warn(
                    f"Every weight of {name} is pruned, so the layer returns only its bias. "
                    f"{FILL_LAYERS}"
                )
        if zeros > 0 and "" not in self._warned:
            self._warned.add("")
            warn(
                f"{zeros} latent weights that should be kept are exactly 0: the network has more "
                "zeros than the target. Initialize these weights, or exclude them (exclude=)."
            )


@torch.no_grad()
def _counts(
    weights: LatentWeights, local: Sequence[Tensor], method: BoundMethod, pruning: Pruning
) -> Tensor:
    """Return counts: NaN of weights and thresholds, kept weights that are 0, kept ones per tensor.

    Returns:
        int64 of shape (2 + tensors,).
    """
    broken = _broken(weights, method, pruning)
    nan = _count_nan(weights, local).sum() + (0 if broken is None else broken.sum())
    zero = weights.total(torch.stack([(part == 0).sum() for part in local])).sum()
    pruned = count_pruned_by(method, weights, pruning)
    return torch.cat([torch.stack([nan, zero - pruned.sum()]), weights.sizes - pruned])


def count_pruned_by(method: BoundMethod, weights: LatentWeights, pruning: Pruning) -> Tensor:
    """Return the number of pruned weights of each tensor, int64 of shape (tensors,).

    Args:
        method: the method, bound to the weights.
        weights: the latent weights.
        pruning: the thresholds or masks of the method.

    Example:
        >>> from torch import nn
        >>> from torch_feather import sparsify
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = sparsify(
        ...     model, optimizer, sparsity=0.9, total_steps=1, schedule="constant"
        ... )
        >>> training = sparsifier.step.training
        >>> count_pruned_by(training.method, training.weights, training.pruning)
        tensor([90])
    """
    counts = [method.pruned(weights, pruning, i).sum() for i in range(len(weights.views))]
    return weights.total(torch.stack(counts))


def _count_nan(weights: LatentWeights, local: Sequence[Tensor]) -> Tensor:
    """Return the number of NaN of each weight tensor, in all copies of it."""
    return weights.common(torch.stack([part.isnan().sum() for part in local]))


def _thresholds_learned(method: BoundMethod) -> list[Tensor]:
    """Return the learned entries of the state with one number per weight tensor."""
    entries = [method.state[name] for name in method.facts.learned]
    return [entry.flat for entry in entries if not entry.per_weight]


def _learned_finite(method: BoundMethod) -> bool:
    return all(bool(entry.isfinite().all()) for entry in _thresholds_learned(method))


def _broken(weights: LatentWeights, method: BoundMethod, pruning: Pruning) -> Tensor | None:
    """Return the mask of tensors with a learned threshold that is not finite; None without any."""
    learned = _thresholds_learned(method)
    if not learned:
        return None
    tau = torch.stack([method.threshold(weights, pruning, i) for i in range(len(weights.views))])
    finite = tau.isfinite()
    for entry in learned:
        finite &= entry.isfinite()
    return ~finite
