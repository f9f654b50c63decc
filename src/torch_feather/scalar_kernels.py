"""The numbers of a step as Triton kernels, one launch each; `scalars.py` defines them.

Imported for CUDA tensors only, since Triton is not available on every platform of PyTorch.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching

CHUNK = 1024
"""Weight tensors whose zeros are added at a time."""
ROUNDING = 2.0**52
"""A number from 0 to 2^51 plus this, minus this, is rounded to an integer, half to even."""


@triton.jit(do_not_specialize=["steps", "tensors", "size"])
def _scheduled(
    step, steps, targets, rests, zeros, tensors, size, out, ZEROS: tl.constexpr, CHUNK: tl.constexpr
):
    position = tl.minimum(tl.load(step), steps)
    value = tl.load(targets + position)
    if ZEROS:
        total = tl.zeros([], tl.int64)
        for start in range(0, tensors, CHUNK):
            i = start + tl.arange(0, CHUNK)
            total += tl.sum(tl.load(zeros + i, mask=i < tensors, other=0), 0)
        begin = total.to(tl.float64) / size.to(tl.float64)
        value = value + begin * tl.load(rests + position)
    tl.store(out, value)


@triton.jit(do_not_specialize=["size"])
def _count(sparsity, size, out, ROUNDING: tl.constexpr):
    exact = tl.load(sparsity) * size.to(tl.float64)
    tl.store(out, ((exact + ROUNDING) - ROUNDING).to(tl.int64))


@triton.jit(do_not_specialize=["steps"])
def _progress(step, steps, out):
    part = tl.load(step).to(tl.float64) / steps.to(tl.float64)
    tl.store(out, tl.minimum(part, 1.0))


def scheduled(
    step: Tensor, targets: Tensor, rests: Tensor, zeros: Tensor | None, size: int
) -> Tensor:
    """Return the target sparsity after `step` steps; arguments as for `scalars.scheduled`.

    Example:
        >>> from torch_feather import scalars
        >>> scheduled.__name__ == scalars.scheduled.__name__
        True
    """
    out = torch.empty((), dtype=torch.float64, device=step.device)
    tensors = 0 if zeros is None else zeros.numel()
    counts = step if zeros is None else zeros
    launching.launch(
        _scheduled, 1, step, targets.numel() - 1, targets, rests, counts, tensors, size, out,
        ZEROS=zeros is not None, CHUNK=CHUNK,
    )  # fmt: skip
    return out


def count_of(sparsity: Tensor, size: int) -> Tensor:
    """Return round(sparsity * size); arguments as for `scalars.count_of`.

    Example:
        >>> from torch_feather import scalars
        >>> count_of.__name__ == scalars.count_of.__name__
        True
    """
    out = torch.empty((), dtype=torch.int64, device=sparsity.device)
    launching.launch(_count, 1, sparsity, size, out, ROUNDING=ROUNDING)
    return out


def progress(step: Tensor, steps: int) -> Tensor:
    """Return the completed fraction of training; arguments as for `scalars.progress`.

    Example:
        >>> from torch_feather import scalars
        >>> progress.__name__ == scalars.progress.__name__
        True
    """
    out = torch.empty((), dtype=torch.float64, device=step.device)
    launching.launch(_progress, 1, step, steps, out)
    return out
