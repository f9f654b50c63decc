"""The numbers of a step, on the device: target sparsity, count of pruned weights, progress.

On an accelerator each operation is a launch, even on one number. Where Triton works, each of these
functions is one launch (`scalar_kernels.py`), with the same bits. On a CPU, an operation of PyTorch
on one number takes several times as long as one of Python, which rounds alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import devices, launching


def scheduled(
    step: Tensor, targets: Tensor, rests: Tensor, zeros: Tensor | None, size: int
) -> Tensor:
    """Return the target sparsity after `step` steps, 0-dimensional float64.

    Args:
        step: 0-dimensional int64; the last value holds beyond the table.
        targets: the target after 0 .. n steps for a model that starts without zeros, float64.
        rests: the fraction of the schedule that is left then, float64.
        zeros: zeros of each weight tensor when training began, int64; None for no zeros.
        size: number of weights.

    Example:
        >>> targets, rests = torch.tensor([[0.0, 0.4], [1.0, 0.5]]).double()
        >>> found = scheduled(torch.tensor(1), targets, rests, torch.tensor([2, 3]), 10)
        >>> round(float(found), 3)
        0.65
    """
    if launching.uses_triton(step.device):
        from . import scalar_kernels

        return scalar_kernels.scheduled(step, targets, rests, zeros, size)
    if not devices.synchronizes(step.device):
        at = min(int(step), targets.numel() - 1)
        target = float(targets[at])
        if zeros is not None:
            target += sum(zeros.tolist()) / size * float(rests[at])
        return torch.scalar_tensor(target, dtype=torch.float64)
    # `take`: indexing by a tensor would read the step on the host.
    position = step.clamp(max=targets.numel() - 1)
    value = targets.take(position)
    if zeros is None:
        return value
    return value + zeros.sum(dtype=torch.float64) / size * rests.take(position)


def count_of(sparsity: Tensor, size: int) -> Tensor:
    """Return how many of `size` weights a sparsity prunes: rounded half to even, int64.

    Args:
        sparsity: 0-dimensional float64.
        size: number of weights.

    Example:
        >>> int(count_of(torch.tensor(0.25).double(), 10))
        2
    """
    if launching.uses_triton(sparsity.device):
        from . import scalar_kernels

        return scalar_kernels.count_of(sparsity, size)
    if not devices.synchronizes(sparsity.device):
        return torch.scalar_tensor(round(float(sparsity) * size), dtype=torch.int64)
    return (sparsity * size).round().long()


def progress(step: Tensor, steps: int) -> Tensor:
    """Return the completed fraction of training after `step` steps, 0-dimensional float64.

    Args:
        step: 0-dimensional int64.
        steps: steps of the whole training.

    Example:
        >>> progress(torch.tensor(5), 10)
        tensor(0.5000, dtype=torch.float64)
    """
    if launching.uses_triton(step.device):
        from . import scalar_kernels

        return scalar_kernels.progress(step, steps)
    if not devices.synchronizes(step.device):
        return torch.scalar_tensor(min(int(step) / steps, 1.0), dtype=torch.float64)
    return (step.double() / steps).clamp(max=1.0)
