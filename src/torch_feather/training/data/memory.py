"""Batches of images that lie decoded in memory, on the device that trains.

An epoch needs no worker processes: a batch is one gather that picks the images and crops and
mirrors each of them by its own random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import DataConfig
from ..errors import DataError
from .dataset import Dataset, Images
from .epochs import Epochs, share
from .normalize import Normalize


class TrainLoader(Epochs):
    """Shuffled, shifted and mirrored batches."""

    def __init__(
        self,
        data: Dataset,
        config: DataConfig,
        batch_size: int,
        seed: int,
        device: torch.device,
        channels_last: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(len(data.train), batch_size, config.drop_last, seed, rank, ranks)
        self.size = data.train.pixels.shape[1]
        if config.shift >= self.size:
            raise DataError(f"data.shift {config.shift} moves all of {self.size} pixels away")
        pad = (0, 0, config.shift, config.shift, config.shift, config.shift)
        self.pixels = torch.nn.functional.pad(data.train.pixels, pad).to(device)
        self.labels = data.train.labels.to(device)
        self.normalize = Normalize(data.mean, data.std, device, channels_last)
        self.shift, self.flip = config.shift, config.flip

    def _draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def integers(high: int) -> Tensor:
            return torch.randint(high, (self.count,), generator=self.generator)

        order = torch.randperm(self.count, generator=self.generator)
        shifts = 2 * self.shift + 1
        down, right = integers(shifts), integers(shifts)
        mirrored = integers(2 if self.flip else 1).bool()
        device = self.labels.device
        return (
            order.to(device, non_blocking=True),
            down.to(device, non_blocking=True),
            right.to(device, non_blocking=True),
            mirrored.to(device, non_blocking=True),
        )

    def _load(
        self, drawn: tuple[Tensor, Tensor, Tensor, Tensor], parts: list[slice]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order, down, right, mirrored = drawn
        grid = torch.arange(self.size, device=order.device)
        for part in parts:
            index = order[part]
            rows = down[part, None] + grid
            columns = torch.where(mirrored[part, None], self.size - 1 - grid, grid)
            columns = columns + right[part, None]
            pixels = self.pixels[index[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield self.normalize(pixels), self.labels[index]


class EvalLoader:
    """The images of one set in order, unchanged; each rank has a part of its own."""

    def __init__(
        self,
        data: Dataset,
        images: Images,
        device: torch.device,
        batch_size: int = 512,
        channels_last: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        own = share(0, len(images), rank, ranks)
        self.pixels, self.labels = images.pixels[own].to(device), images.labels[own].to(device)
        self.normalize = Normalize(data.mean, data.std, device, channels_last)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self.normalize(self.pixels[part]), self.labels[part]
