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
        """As int64 of shape (7,)."""
        return torch.tensor(list(self), dtype=torch.int64)

    @classmethod
    def read(cls, tensor: Tensor) -> Header | None:
        """From a tensor, or None where it is no header."""
        values = torch.as_tensor(tensor).flatten().tolist()
        return cls(*map(int, values)) if len(values) == len(cls._fields) else None

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


def digest(text: str) -> int:
    """A 63-bit hash that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
