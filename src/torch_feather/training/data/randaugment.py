"""RandAugment by torchvision, seeded for each image."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from ...errors import install_hint
from ..errors import DataError
from .seeds import seeded

OPERATIONS = 2  # per image, the default of torchvision and of the paper for ImageNet


def rand_augment(pixels: Tensor, magnitude: int, seed: int) -> Tensor:
    """Return an image after two random operations (Cubuk et al., 2020).

    Args:
        pixels: uint8 (H, W, C) with one or three channels.
        magnitude: strength of the operations, 0 to 30.
        seed: determines the operations.

    Raises:
        DataError: torchvision is not installed.

    Example:
        >>> import torch
        >>> pixels = torch.arange(192, dtype=torch.uint8).reshape(8, 8, 3)
        >>> torch.equal(rand_augment(pixels, 9, seed=1), rand_augment(pixels, 9, seed=1))
        True
    """
    with seeded(seed):
        return _transform(magnitude)(pixels.permute(2, 0, 1)).permute(1, 2, 0)


@cache
def _transform(magnitude: int) -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError:
        raise DataError(
            f"data.randaugment requires torchvision. {install_hint('vision')}"
        ) from None
    return v2.RandAugment(num_ops=OPERATIONS, magnitude=magnitude)
