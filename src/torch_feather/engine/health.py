"""Checks during training: NaN, layers without weights, unexpected zeros, the end of training.

On an accelerator, `check` does not synchronize the host. It copies counts asynchronously, and reads
them in a later step. The check after the last step is the exception.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import devices
from ..errors import NonFiniteWeightError, fill_layers, option, some, warn
from ..methods.base import BoundMethod, Pruning
from ..prunable import is_lazy, unwrap
from ..weights.counts import count_nan, count_not_finite, count_true, count_zeros
from ..weights.latent import LatentWeights
from ..weights.shards import local as local_shard

# Steps between two checks that need a pass over the weights, or a copy to the host.
POLL = 100

ADVICE = "Lower the learning rate, clip gradients, or resume from an earlier checkpoint."


class Health:
    """Checks the weights of one training run.

    Args:
        model: the model.
        names: names of the weight tensors.
        total_steps: optimizer steps of the whole training.

    Example:
        >>> w = torch.tensor([1.0, torch.nan])
        >>> try:
        ...     Health(nn.Module(), ["w"], 100).raise_if_nan(LatentWeights([w]), [w])
        ... except NonFiniteWeightError as error:
        ...     print(str(error)[:20])
        Weights of w are NaN
    """

    def __init__(self, model: nn.Module, names: Sequence[str], total_steps: int) -> None:
        self._model, self._names = model, names
        self._total_steps = total_steps
        self._steps = 0  # since the start of this process
        self._most_steps = 0  # upper bound of the step count, known without reading the device
        self._ended = False  # the check after the last step is done
        # Frozen constants, such as an attention mask of -inf, are no result of training.
        self._constants = {
            name
            for name, parameter in self._parameters()
            if not parameter.requires_grad and _count_not_finite(parameter).item()
        }
        self._constant_buffers = {name for name, buffer in self._buffers() if _is_broken(buffer)}
        self._empty: set[str] | None = None  # the layers that the warning listed
        self._warned_of_zeros = False
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def check(
        self,
        weights: LatentWeights,
        local: Sequence[Tensor],
        method: BoundMethod,
        pruning: Pruning,
        step: Tensor,
        nonfinite: bool,
    ) -> None:
        """Raise for NaN and warn of empty layers, after a step; after the last, check everything.

        Args:
            weights: the latent weights.
            local: local shards of the parameters, which hold effective weights.
            method: the method.
            pruning: the pruning of this step.
            step: optimizer steps taken; on an accelerator the host does not read it.
            nonfinite: whether a local parameter on a CPU may be NaN or infinite.

        Raises:
            NonFiniteWeightError: weights or learned thresholds are NaN; or, after the last step, a
                parameter of the model is not finite.
        """
        self._steps += 1
        self._most_steps += 1
        if not devices.synchronizes(weights.device):
            if weights.shards is not None:
                nonfinite = bool(weights.common(torch.tensor(int(nonfinite))))
            if nonfinite or not _learned_finite(method):
                self.raise_if_nan(weights, local, method, pruning)
            if self._steps % POLL == 0 or int(step) in (method.target_step, self._total_steps):
                self.inspect(weights, local, method, pruning, step)
            if int(step) == self._total_steps:
                self.raise_if_not_finite(weights, local, method, pruning)
        elif not devices.is_capturing(weights.device):
            if self._is_last(step):
                self.raise_if_not_finite(weights, local, method, pruning)
            if self._pending is None and self._steps % POLL == 0:
                with torch.cuda.device(weights.device):
                    counts = _counts(weights, local, method, pruning, step)
                    pinned = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
                    event = torch.cuda.Event()
                    pinned.copy_(counts, non_blocking=True)
                    event.record()
                self._pending = pinned, event
            elif self._pending is not None and self._is_copied(weights, self._pending[1]):
                counts, self._pending = self._pending[0], None
                self._report(weights, local, method, pruning, counts)

    def resume_at(self, step: int) -> None:
        """Continue at a loaded step.

        Args:
            step: optimizer steps taken.
        """
        self._most_steps, self._ended = step, False

    def _is_last(self, step: Tensor) -> bool:
        """Return whether this step is the last one, on an accelerator.

        Only the device knows which steps were skipped. So the step is read once the steps that the
        host knows of may have been enough, and again after as many steps as were missing.
        """
        if self._ended or self._most_steps < self._total_steps:
            return False
        self._most_steps = int(step)
        self._ended = self._most_steps >= self._total_steps
        return self._ended

    def inspect(
        self,
        weights: LatentWeights,
        local: Sequence[Tensor],
        method: BoundMethod,
        pruning: Pruning,
        step: Tensor,
        final: bool = False,
        pruned: Tensor | None = None,
    ) -> None:
        """Check at once, which synchronizes the host.

        Arguments and errors as for `check`; `final` at the end of training; `pruned` is the result
        of `count_pruned_by` if it is known.
        """
        counts = _counts(weights, local, method, pruning, step, pruned).cpu()
        self._report(weights, local, method, pruning, counts, final)

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
        broken = None if method is None else _broken(weights, method, pruning)
        names = [] if broken is None else self._named(broken)
        if names and not self._named(_count_nan(weights, weights.views)):
            raise NonFiniteWeightError(
                f"The learned thresholds of {some(names)} are not finite, because a weight or a "
                f"gradient was not. These layers cannot be pruned. {ADVICE}"
            )
        if names := self._named(_count_nan(weights, local)):
            raise NonFiniteWeightError(
                f"Weights of {some(names)} are NaN. They are kept in the network, so that its loss "
                f"shows them. {ADVICE}"
            )

    @torch.no_grad()
    def raise_if_not_finite(
        self,
        weights: LatentWeights,
        local: Sequence[Tensor],
        method: BoundMethod,
        pruning: Pruning,
        latent: bool = True,
    ) -> None:
        """Raise unless all parameters of the model are finite. The host is synchronized.

        Args:
            weights, local, method, pruning: as for `check`.
            latent: whether the latent weights must be finite too.

        Raises:
            NonFiniteWeightError: names the parameters.
        """
        checked = [(n, p) for n, p in self._parameters() if n not in self._constants]
        if latent:
            pairs = zip(self._names, weights.views, strict=True)
            checked += [(f"{name} (latent weights)", view) for name, view in pairs]
        names = [name for name, _ in checked]
        counts = [_count_not_finite(part).to(weights.device) for _, part in checked]
        found = weights.common(torch.stack(counts)).tolist()
        if any(found) or not _learned_finite(method) or self._constants & set(self._names):
            self.raise_if_nan(weights, local, method, pruning)
        if broken := [name for name, n in zip(names, found, strict=True) if n]:
            raise NonFiniteWeightError(
                f"Training ends with values that are NaN or infinite, in {some(broken)}. {ADVICE}"
            )
        self._warn_of_buffers()

    def _warn_of_buffers(self) -> None:
        """Warn of buffers that became NaN or infinite, such as statistics of a batch norm."""
        named = [(name, b) for name, b in self._buffers() if name not in self._constant_buffers]
        if broken := [name for name, buffer in named if _is_broken(buffer)]:
            self._constant_buffers.update(broken)
            warn(
                f"Training ends with buffers that are NaN or infinite: {some(broken)}. The network "
                "may return NaN in evaluation mode. Statistics of batch norms can be estimated "
                "again: feather.recalibrate_batchnorm(model, loader)."
            )

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """Return all floating-point buffers of the model that have values, by name."""
        named = unwrap(self._model).named_buffers()
        valued = ((n, b) for n, b in named if not (is_lazy(b) or b.is_meta))
        return [(n.replace("_orig_mod.", ""), b) for n, b in valued if b.is_floating_point()]

    def _parameters(self) -> list[tuple[str, Tensor]]:
        """Return all parameters of the model that have values, by name."""
        named = unwrap(self._model).named_parameters()
        valued = ((name, p) for name, p in named if not (is_lazy(p) or p.is_meta))
        return [(name.replace("_orig_mod.", ""), p) for name, p in valued]

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
        final: bool = False,
    ) -> None:
        nan, zeros, step, *kept = counts.tolist()
        if nan:
            self.raise_if_nan(weights, local, method, pruning)
        # Before the target, more layers may follow. One list is better than one warning per layer.
        complete = step >= method.target_step or bool(method.facts.learned)
        if final or (complete and self._empty is None):
            named = self._empty or set()
            pairs = zip(self._names, kept, strict=True)
            if empty := [name for name, left in pairs if left == 0 and name not in named]:
                self._empty = named | set(empty)
                self._warn_of_empty(empty)
        if zeros > 0 and not self._warned_of_zeros:
            self._warned_of_zeros = True
            halves = [p.dtype for p in local if p.dtype.itemsize == 2]
            wider = f" If they are too small for {halves[0]}, use a wider type." if halves else ""
            warn(
                f"{zeros} latent weights that should be kept are exactly 0: the network has more "
                "zeros than the target. Initialize these weights, or exclude them "
                f"({option('exclude')}).{wider}"
            )

    def _warn_of_empty(self, names: Sequence[str]) -> None:
        which = names[0] if len(names) == 1 else f"{len(names)} layers ({some(names, 8)})"
        returns = "the layer returns" if len(names) == 1 else "they return"
        warn(f"Every weight of {which} is pruned, so {returns} only biases. {fill_layers(names)}")


@torch.no_grad()
def _counts(
    weights: LatentWeights,
    local: Sequence[Tensor],
    method: BoundMethod,
    pruning: Pruning,
    step: Tensor,
    pruned: Tensor | None = None,
) -> Tensor:
    """Return NaN of weights and thresholds, kept weights that are 0, step, kept ones per tensor.

    Returns:
        int64 of shape (3 + tensors,).
    """
    broken = _broken(weights, method, pruning)
    nan = _count_nan(weights, local).sum() + (0 if broken is None else broken.sum())
    zero = weights.total(torch.stack([count_zeros(part) for part in local])).sum()
    if pruned is None:
        pruned = count_pruned_by(method, weights, pruning)
    return torch.cat([torch.stack([nan, zero - pruned.sum(), step]), weights.sizes - pruned])


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
    every = range(len(weights.views))
    counts = [count_true(method.pruned(weights, pruning, i)) for i in every]
    return weights.total(torch.stack(counts))


def _count_nan(weights: LatentWeights, local: Sequence[Tensor]) -> Tensor:
    """Return the number of NaN of each weight tensor, in all copies of it."""
    return weights.common(torch.stack([count_nan(part) for part in local]))


def _count_not_finite(tensor: Tensor) -> Tensor:
    """Return the number of NaN and infinite values of a local shard; 0-dimensional."""
    part = local_shard(tensor.detach())
    if part.is_floating_point() and part.dtype.itemsize == 1:
        part = part.float()  # isfinite has no kernels for 8 bits
    try:
        return count_not_finite(part)
    except NotImplementedError:  # a quantized tensor, which other code decodes
        return torch.zeros((), dtype=torch.int64)


def _is_broken(buffer: Tensor) -> bool:
    return bool(_count_not_finite(buffer))


def _thresholds_learned(method: BoundMethod) -> list[Tensor]:
    """Return the learned entries of the state with one number per weight tensor."""
    entries = [method.state[name] for name in method.facts.learned]
    return [entry.flat for entry in entries if not entry.per_weight]


def _learned_finite(method: BoundMethod) -> bool:
    return all(all(map(math.isfinite, entry.tolist())) for entry in _thresholds_learned(method))


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
