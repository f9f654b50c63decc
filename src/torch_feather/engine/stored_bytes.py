"""Tensors as bytes, which optimizers may cast to a float type when they load a state."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor


def to_bytes(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as flat uint8, a copy, which casts to floats keep exactly.

    Example:
        >>> to_bytes(torch.tensor([1.0])).tolist()
        [0, 0, 128, 63]
    """
    return tensor.detach().clone().reshape(-1).view(torch.uint8)


def from_bytes(data: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the tensor that `to_bytes` stored; None if the data does not fit `like`.

    Args:
        data: result of `to_bytes`, perhaps cast to a float type; None for none.
        like: tensor of the expected shape and type.

    Example:
        >>> from_bytes(to_bytes(torch.tensor([1.0])).half(), torch.zeros(1))
        tensor([1.])
    """
    data = stored_bytes(data)
    if data is None or data.numel() != like.numel() * like.element_size():
        return None
    return data.clone().view(like.dtype).reshape(like.shape)


def stored_bytes(value: object) -> Tensor | None:
    """Return bytes that may have been cast to a float type, flat uint8; None for other values.

    Example:
        >>> stored_bytes(torch.tensor([3.0]))
        tensor([3], dtype=torch.uint8)
        >>> stored_bytes(torch.tensor([0.5])) is None
        True
    """
    if not has_values(value) or value.is_complex():
        return None
    data = value.detach().reshape(-1).to(torch.uint8)
    return data if torch.equal(data.to(value.dtype), value.reshape(-1)) else None


def has_values(value: object) -> TypeGuard[Tensor]:
    """Return whether a loaded value is a tensor whose values can be read.

    Example:
        >>> has_values(torch.ones(2)), has_values(torch.ones(2, device="meta")), has_values([1.0])
        (True, False, False)
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not value.is_meta and not value.is_quantized
