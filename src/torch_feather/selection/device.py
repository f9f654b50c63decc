"""Selection on any device: no data-dependent shape, no read by the host.

Non-negative floats have the order of their bits. So the k-th smallest score is found as an integer,
digit by digit, from the most significant one. Each pass counts the values of the next digit among
the scores that share the known digits. Then it steps into the bin that holds the k-th score. Among
the scores equal to it, the last one to prune is found by flat index.

Counts are integers, hence exact in any order of summation. So every device gives the same cutoff,
bit for bit, and so does any number of shards whose counts are added (`sharded.py`). Without Triton,
a stable sort of the integers gives the same.

Source: radix selection, as in Alabi et al., Fast k-selection algorithms for graphics processing
units (2012).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import launching
from .counting import Passes, TorchPasses
from .cutoff import Cutoff
from .float_bits import FLOAT_BITS, wide


def select_device(
    scores: Tensor,
    k: Tensor | int,
    *,
    passes: type[Passes] | None = None,
) -> Cutoff:
    """Return the cutoff of the k smallest scores, in fixed shapes and without a host read of k.

    `torch.compile(fullgraph=True)` makes one graph of it for all k.

    Args:
        scores: flat, contiguous float32 or float64 tensor of numbers >= 0; NaN ranks above
            infinity. Not written to.
        k: number of scores to prune; a 0-dimensional int64 tensor on the device of the scores
            (clamped to the possible range), or an int.
        passes: the implementation of the passes over memory. Default: Triton kernels for CUDA
            tensors if Triton works, else PyTorch; PyTorch under `torch.compile`.

    Raises:
        ValueError: `scores` has another type or layout, or the int k is out of range.

    Example:
        >>> float(select_device(torch.tensor([3.0, 1.0, 2.0]), 2).value)
        2.0
    """
    if scores.dim() != 1 or not scores.is_contiguous() or scores.dtype not in FLOAT_BITS:
        raise ValueError(
            "scores must be a flat, contiguous float32 or float64 tensor, not "
            f"{scores.dtype} of shape {tuple(scores.shape)} with strides {scores.stride()}"
        )
    k = _count_tensor(k, scores.numel(), scores.device)
    return (passes or default_passes(scores))(scores).cutoff(k)


def select_magnitudes(values: Tensor, k: Tensor) -> Cutoff:
    """Return the cutoff of the k smallest |values|, in fixed shapes and without a host read of k.

    Triton kernels read the values themselves; other forms make a copy of the magnitudes.

    Args:
        values: flat, contiguous floating-point tensor. Half precision is ranked in float32.
        k: as for `select_device`, a tensor.

    Example:
        >>> float(select_magnitudes(torch.tensor([3.0, -1.0, 2.0]), torch.tensor(2)).value)
        2.0
    """
    passes = default_passes(values)
    if passes is TorchPasses:
        values = values.to(wide(values.dtype), copy=True).abs_()
    return passes(values).cutoff(k)


def _count_tensor(k: Tensor | int, total: int, device: torch.device) -> Tensor:
    """Return k as a tensor on the device, an int must be in 0..total."""
    if isinstance(k, Tensor):
        return k.to(device, torch.int64, non_blocking=True)
    if not 0 <= k <= total:
        raise ValueError(f"k = {k} is outside 0..{total}, the number of scores")
    return torch.full((), k, dtype=torch.int64, device=device)


def default_passes(scores: Tensor) -> type[Passes]:
    """Return the fastest `Passes` on the device of the scores.

    Args:
        scores: flat floating-point tensor.

    Example:
        >>> default_passes(torch.ones(2)).__name__
        'TorchPasses'
    """
    if launching.uses_triton(scores.device):
        from .triton_kernels import TritonPasses

        return TritonPasses
    return TorchPasses
