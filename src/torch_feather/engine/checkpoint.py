"""What a checkpoint says about the sparsifier that wrote it: a few integers per parameter."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

FORMAT = 1


class Header(NamedTuple):
    """Travels with each parameter's latent weights in the optimizer's state dict."""

    format: int
    step: int
    total_steps: int
    sparsity: int
    """Final target in units of 1e-12."""
    method: int
    """Hash of the method and its options."""
    shape: int
    """Hash of the parameter's shape; 0 for parameters that take no part."""
    image: int
    """Checksum of the parameter's sparse image; 0 for parameters that take no part."""

    def tensor(self) -> Tensor:
        """As uint8 of shape (56,), little-endian.

        Bytes, because an optimizer casts what it loads to the parameter's type: half precision
        holds every byte exactly, but not every integer.
        """
        data = b"".join(value.to_bytes(8, "little", signed=True) for value in self)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    @classmethod
    def read(cls, tensor: Tensor) -> Header | None:
        """From a tensor, or None where it is no header."""
        if tensor.numel() != 8 * len(cls._fields):
            return None
        data = tensor.to("cpu", torch.uint8).numpy().tobytes()
        words = (data[i : i + 8] for i in range(0, len(data), 8))
        return cls(*(int.from_bytes(word, "little", signed=True) for word in words))

    def differences(self, other: Header) -> list[str]:
        """What of `self` (a saved state) does not fit `other` (the present)."""
        if self.format != other.format:
            return [f"its format is {self.format}, this version reads format {other.format}"]
        found = []
        if self.total_steps != other.total_steps:
            found.append(f"its total_steps was {self.total_steps}, now {other.total_steps}")
        if self.sparsity != other.sparsity:
            found.append(
                f"its sparsity was {self.sparsity / 1e12:g}, now {other.sparsity / 1e12:g}"
            )
        if self.method != other.method:
            found.append("its method or the method's options were others")
        if self.shape != other.shape:
            found.append("it is of another model (a weight of another shape, or another choice)")
        return found


def to_bytes(tensor: Tensor) -> Tensor:
    """The bits of a tensor as uint8, flat; a copy. Exact whatever they are cast to, see above."""
    return tensor.detach().clone().reshape(-1).view(torch.uint8)


def from_bytes(data: Tensor | None, like: Tensor) -> Tensor | None:
    """What `to_bytes` made of a tensor like `like`, or None where it is nothing of the kind."""
    if data is None or data.numel() != like.numel() * like.element_size():
        return None
    return data.to(torch.uint8).clone().view(like.dtype).reshape(like.shape)


def digest(text: str) -> int:
    """A 63-bit hash that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
