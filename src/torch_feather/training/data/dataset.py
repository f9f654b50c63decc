"""Three disjoint sets of images, and what a network needs to know about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import DataError
from .cifar import cifar
from .digits import read_digits
from .normalize import Normalize

Arrays = tuple[np.ndarray, np.ndarray]  # pixels, labels


@dataclass(frozen=True)
class Images:
    """`pixels`: uint8 (N, H, W, C); `labels`: int64 (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Images:
        """The images at `index`, in that order."""
        chosen = torch.from_numpy(index)
        return Images(self.pixels[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test images."""

    name: str
    train: Images
    validation: Images  # empty where the whole training set is used
    test: Images
    classes: int
    mean: tuple[float, ...]  # per channel, of pixels scaled to [0, 1]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.test.pixels.shape[-1]

    def example(self) -> Tensor:
        """One image as the network sees it: float32 (1, C, H, W)."""
        return Normalize(self.mean, self.std)(self.test.pixels[:1])


@dataclass(frozen=True)
class Source:
    """How to get one data set: its two parts as (pixels, labels), and its constants."""

    read: Callable[[str | None], tuple[Arrays, Arrays]]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
SOURCES = {
    "digits": Source(read_digits, 10, (0.288,), (0.354,)),
    "cifar10": Source(cifar("cifar10", "label", 10), 10, CIFAR_MEAN, (0.2470, 0.2435, 0.2616)),
    "cifar100": Source(
        cifar("cifar100", "fine_label", 100), 100, CIFAR_MEAN, (0.2023, 0.1994, 0.2010)
    ),
}


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Read, average down and split.

    The split into training and validation images depends on `seed` alone.

    Raises:
        DataError: files that are missing, corrupt, truncated, or not this data set.
    """
    source = SOURCES[config.name]
    train, test = (Images(*_to_tensors(part, config)) for part in source.read(config.path))
    kept, held_out = split(len(train), config.validation, seed)
    return Dataset(
        config.name,
        train.take(kept) if len(held_out) else train,
        train.take(held_out),
        test,
        source.classes,
        source.mean,
        source.std,
    )


def split(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images to train on, and of those that are held out."""
    # RandomState: NumPy promises that its streams never change
    order = np.random.RandomState(seed % 2**32).permutation(count)
    held_out = round(share * count)
    if held_out == count:
        raise DataError(f"data.validation {share} leaves no image to train on")
    return order[held_out:], order[:held_out]


def _to_tensors(part: Arrays, config: DataConfig) -> tuple[Tensor, Tensor]:
    pixels, labels = part
    size = pixels.shape[1]
    if config.resolution is not None and config.resolution != size:
        factor, rest = divmod(size, config.resolution)
        if rest or factor < 1:
            raise DataError(
                f"data.resolution {config.resolution}: {config.name} has {size} pixels a side; "
                f"choose a divisor of it"
            )
        corners = [(i, j) for i in range(factor) for j in range(factor)]
        total = sum(pixels[:, i::factor, j::factor].astype(np.uint16) for i, j in corners)
        pixels = ((total + factor**2 // 2) // factor**2).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(labels)
