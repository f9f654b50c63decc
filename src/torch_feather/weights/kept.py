"""The effective values of kept weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import Operator


def kept_values(w: Tensor, tau: Tensor, operator: Operator, dtype: torch.dtype) -> Tensor:
    """Return the effective values of kept weights `w` in type `dtype`, 0 only if w is 0.

    Example:
        >>> from torch_feather.operators import Soft
        >>> kept_values(torch.tensor([2.0]), torch.tensor(0.5), Soft(), torch.float32)
        tensor([1.5000])
    """
    if operator.is_identity:
        return w.to(dtype)
    return keep_nonzero(operator(w, tau).to(dtype), w)


def keep_nonzero(values: Tensor, w: Tensor) -> Tensor:
    """Return `values`, with 0 replaced by the smallest number of their type unless w is 0.

    Example:
        >>> w = torch.tensor([1e-9, 0.0])
        >>> keep_nonzero(w.half(), w) > 0
        tensor([ True, False])
    """
    info = torch.finfo(values.dtype)
    least = values.new_full((), info.smallest_normal * info.eps)
    vanished = (values == 0) & (w != 0)
    return torch.where(vanished, least.copysign(w.to(values.dtype)), values)
