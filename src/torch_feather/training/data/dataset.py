"""Three disjoint sets of images, and what a network needs to know about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .files import ImageFiles
from .normalize import Normalize
from .prepare import Augment, Center

Arrays = tuple[np.ndarray, np.ndarray]  # pixels (N, H, W, C), labels (N,)


@dataclass(frozen=True)
class Images:
    """`pixels`: uint8 (N, H, W, C); `labels`: int64 (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def resolution(self) -> int:
        """Rows of an image: of a square one, pixels a side."""
        return self.pixels.shape[1]

    def take(self, index: np.ndarray) -> Images:
        """The images at `index`, in that order."""
        chosen = torch.from_numpy(index)
        return Images(self.pixels[chosen], self.labels[chosen])

    def first(self) -> Tensor:
        """One image: uint8 (1, H, W, C)."""
        return self.pixels[:1]


@dataclass(frozen=True)
class EncodedImages:
    """Images that are decoded each time they are used, and prepared in one way."""

    files: ImageFiles
    prepare: Center | Augment
    resolution: int

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> Tensor:
        """int64 (N,)."""
        return torch.from_numpy(self.files.labels)

    def first(self) -> Tensor:
        """One image: uint8 (1, H, W, C)."""
        return self.load(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))

    def load(self, index: np.ndarray, seeds: np.ndarray) -> Tensor:
        """uint8 (B, H, W, C); what is random about an image follows from its seed alone."""
        pixels = torch.empty(len(index), self.resolution, self.resolution, 3, dtype=torch.uint8)
        for target, i, seed in zip(pixels, index.tolist(), seeds.tolist(), strict=True):
            target.copy_(self.prepare(self.files.decode(i), seed))
        return pixels


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test images."""

    name: str
    train: Images | EncodedImages
    validation: Images | EncodedImages  # empty where the whole training set is used
    test: Images | EncodedImages
    classes: int
    mean: tuple[float, ...]  # per channel, of pixels scaled to [0, 1]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return len(self.mean)

    def example(self) -> Tensor:
        """One image as the network sees it: float32 (1, C, H, W)."""
        return Normalize(self.mean, self.std)(self.test.first())


def split(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to train on, and of those that are held out; by `seed` alone."""
    # RandomState: NumPy promises that its streams never change
    order = np.random.RandomState(seed % 2**32).permutation(count)
    held_out = round(share * count)
    if held_out == count:
        raise DataError(f"data.validation {share} leaves no image to train on")
    return (order[held_out:] if held_out else np.arange(count)), order[:held_out]
