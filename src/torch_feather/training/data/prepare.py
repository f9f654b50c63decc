"""Crops of a decoded image, for evaluation and for training; uint8 (H, W, C) in and out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import DataConfig
from ..errors import DataError
from .crops import DRAWS, random_boxes, resize
from .images import MAX_PIXELS
from .randaugment import rand_augment


@dataclass(frozen=True)
class Center:
    """Scales an image to `side` pixels on its shorter side, and takes the center crop.

    Attributes:
        side: length of the shorter side after scaling.
        resolution: height and width of the crop.

    Example:
        >>> Center(8, 6)(torch.zeros(20, 16, 3, dtype=torch.uint8)).shape
        torch.Size([6, 6, 3])
    """

    side: int
    resolution: int

    def __call__(self, pixels: Tensor, seed: int = 0) -> Tensor:
        """Return the crop. `seed` is not used.

        Raises:
            DataError: the image is so long that the scaled one is too large.
        """
        height, width, _ = pixels.shape
        short = min(height, width)
        high, wide = (self.side * length // short for length in (height, width))
        if high * wide > MAX_PIXELS:
            raise DataError(
                f"{width}x{height} pixels, with a shorter side of {self.side} these are "
                f"{wide}x{high}, but at most {MAX_PIXELS:,} pixels are supported"
            )
        top, left = (round((length - self.resolution) / 2) for length in (high, wide))
        scaled = resize(pixels, high, wide)
        return scaled[top : top + self.resolution, left : left + self.resolution]


@dataclass(frozen=True)
class Augment:
    """Crops and mirrors an image at random.

    Attributes:
        config: the kind of crop.
        resolution: height and width of the result.

    Example:
        >>> augment = Augment(DataConfig(crop="resized"), resolution=6)
        >>> pixels = torch.arange(768).reshape(16, 16, 3).to(torch.uint8)
        >>> augment(pixels, seed=0).shape
        torch.Size([6, 6, 3])
        >>> torch.equal(augment(pixels, seed=0), augment(pixels, seed=0))
        True
    """

    config: DataConfig
    resolution: int

    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """Return the augmented image. `seed` determines all random numbers."""
        uniform = torch.rand(
            DRAWS + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        crop = self._resized if self.config.crop == "resized" else self._shifted
        pixels = crop(pixels, uniform[1:])
        pixels = pixels.flip(1) if self.config.flip and uniform[0] < 0.5 else pixels
        if self.config.randaugment is not None:
            pixels = rand_augment(pixels, self.config.randaugment, seed)
        return pixels

    def _resized(self, pixels: Tensor, uniform: Tensor) -> Tensor:
        height, width, _ = pixels.shape
        boxes = random_boxes(uniform[None], height, width, self.config.smallest_crop)
        top, left, high, wide = boxes[0].tolist()
        part = pixels[top : top + high, left : left + wide]
        return resize(part, self.resolution, self.resolution)

    def _shifted(self, pixels: Tensor, uniform: Tensor) -> Tensor:
        pixels = Center(self.resolution, self.resolution)(pixels)
        shift = self.config.shift
        top, left = (uniform[:2] * (2 * shift + 1)).long().tolist()
        padded = F.pad(pixels, (0, 0, shift, shift, shift, shift))
        return padded[top : top + self.resolution, left : left + self.resolution]
