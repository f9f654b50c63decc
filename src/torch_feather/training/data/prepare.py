"""What happens to a decoded image on its way to the network; uint8 (H, W, C) in and out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import DataConfig
from .crops import DRAWS, random_boxes, resize


@dataclass(frozen=True)
class Center:
    """Scaled so that the shorter side has `side` pixels; of that, the central square."""

    side: int
    resolution: int

    def __call__(self, pixels: Tensor, seed: int = 0) -> Tensor:
        """Nothing is random here."""
        height, width, _ = pixels.shape
        short = min(height, width)
        high, wide = (self.side * length // short for length in (height, width))
        top, left = (round((length - self.resolution) / 2) for length in (high, wide))
        scaled = resize(pixels, high, wide)
        return scaled[top : top + self.resolution, left : left + self.resolution]


@dataclass(frozen=True)
class Augment:
    """Cropped and mirrored by random numbers that follow from a seed."""

    config: DataConfig
    resolution: int

    def __call__(self, pixels: Tensor, seed: int) -> Tensor:
        """The same seed gives the same pixels."""
        uniform = torch.rand(
            DRAWS + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        crop = self._resized if self.config.crop == "resized" else self._shifted
        pixels = crop(pixels, uniform[1:])
        return pixels.flip(1) if self.config.flip and uniform[0] < 0.5 else pixels

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
