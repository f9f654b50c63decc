"""The end of training: the values that the model keeps, and the check of their count."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import StateError, warn
from ..methods.base import BoundMethod, Pruning
from ..weights.counts import count_true, count_zeros
from ..weights.latent import LatentWeights, copy_all
from ..weights.shards import local
from .health import count_pruned_by
from .training import Training


def settle(training: Training, sync: Callable[[], None]) -> tuple[bool, bool]:
    """Give the parameters the values that the model keeps.

    Args:
        training: the training run, after its last step.
        sync: lets latent and effective weights follow external writes.

    Returns:
        Whether other code wrote these values; whether modified weights were pruned again.

    Example:
        >>> from torch import nn
        >>> from torch_feather import sparsify
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = sparsify(model, optimizer, sparsity=0.9, total_steps=8)
        >>> settle(sparsifier.step.training, sparsifier.attachment.sync)
        (False, False)
    """
    if training.is_unmodified():
        return False, False
    # Read before `sync`, which rewrites parameters that were moved or cast.
    written = [local(p).detach().clone() for p in training.binding.current()]
    sync()
    effective = [part.detach() for part in training.binding.local]
    state = training.weights, training.method, training.pruning
    values = final_values(*state, training.count, written, effective)
    if values is written:
        training.write(values)
    return values is written, values is effective


def final_values(
    weights: LatentWeights,
    method: BoundMethod,
    pruning: Pruning,
    step: Tensor,
    written: Sequence[Tensor],
    effective: Sequence[Tensor],
) -> Sequence[Tensor]:
    """Return the values that the model keeps: written ones if they are valid, else effective ones.

    If the model was modified externally and has the target sparsity, it is kept as it is. An
    example is the best checkpoint, which some frameworks load after training.

    Args:
        weights: the latent weights.
        method: the method.
        pruning: its thresholds or masks.
        step: optimizer steps taken.
        written: values of the parameters at the end of training, local shards.
        effective: the effective weights, local shards.

    Example:
        >>> from torch import nn
        >>> from torch_feather import sparsify
        >>> model = nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> training = sparsify(model, optimizer, sparsity=0.9, total_steps=8).step.training
        >>> state = training.weights, training.method, training.pruning, training.count
        >>> held = [part.detach() for part in training.binding.local]
        >>> final_values(*state, held, held)[0] is held[0]
        True
    """
    zeros, left = (_count_zeros(weights, parts) for parts in (written, effective))
    expected = int(count_pruned_by(method, weights, pruning).sum())
    if zeros == expected and _admits(weights, method, step, written):
        return written
    if zeros != left or zeros == expected:
        reason = "at invalid positions" if zeros == expected else f"expected {expected}"
        warn(
            f"The model was modified before finalize(): {zeros} zeros, {reason}. It was pruned "
            "again; unchanged weights kept their latent values. If you loaded a complete "
            "checkpoint, call sparsifier.reset_latents() before finalize()."
        )
    return effective


def check_count(pruned: int, size: int, sparsity: float) -> None:
    """Check that exactly round(s N) weights are pruned.

    Args:
        pruned: the number of pruned weights.
        size: N, the number of weights.
        sparsity: s.

    Raises:
        StateError: another number is pruned.

    Example:
        >>> check_count(90, 100, 0.9)
        >>> try:
        ...     check_count(0, 100, 0.9)
        ... except StateError as error:
        ...     print(error)
        Sparsity 0.9 means 90 zeros among 100 weights, but the method left 0. ...
    """
    target = round(sparsity * size)
    if pruned != target:
        raise StateError(
            f"Sparsity {sparsity} means {target} zeros among {size} weights, but the "
            f"method left {pruned}. To keep the model as it is, call finalize(force=True)."
        )


def _count_zeros(weights: LatentWeights, parts: Sequence[Tensor]) -> int:
    """Return the number of zeros in local shards, over all processes."""
    return int(weights.total(torch.stack([count_zeros(part) for part in parts])).sum())


def _admits(
    weights: LatentWeights, method: BoundMethod, step: Tensor, parts: Sequence[Tensor]
) -> bool:
    """Return whether the zeros among these values have the positions that the method requires.

    If the method keeps a mask, learns thresholds or has no exact count, any positions are valid.
    """
    facts = method.facts
    keeps_mask = any(entry.per_weight for entry in method.state.values())
    if keeps_mask or facts.learned or not facts.exact:
        return True
    other = weights.like([torch.empty_like(flat) for flat in weights.flats])
    copy_all(other.views, parts)
    pruning = method.update(other, step)
    pairs = enumerate(other.views)
    wrong = [count_true((w == 0) != method.pruned(other, pruning, i)) for i, w in pairs]
    return not bool(weights.total(torch.stack(wrong)).sum())
