"""Loaders of images that are decoded in memory, on the training device.

No worker processes are needed. A batch is one gather that selects, shifts and mirrors its images,
or a gather and two matrix products that crop and scale them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import DataConfig
from .crops import DRAWS, random_boxes, resize_boxes
from .dataset import Dataset, Images, Text
from .epochs import Epochs, InOrder
from .randaugment import rand_augment


class TrainLoader(Epochs):
    """Shuffled training batches with random crops and mirroring; arguments as for `Epochs`.

    Example:
        >>> images = Images(torch.zeros(5, 8, 8, 1, dtype=torch.uint8), torch.arange(5))
        >>> data = Dataset("black", images, images, images, 5, (0.5,), (0.5,))
        >>> loader = TrainLoader(data, DataConfig(), 2, 0, torch.device("cpu"))
        >>> [batch.x.shape[0] for batch in loader]
        [2, 2, 1]
        >>> sorted(label for batch in loader for label in batch.y.tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(
        self,
        data: Dataset,
        config: DataConfig,
        batch_size: int,
        seed: int,
        device: torch.device,
        **options: Any,
    ) -> None:
        super().__init__(data, config, batch_size, seed, device, **options)
        assert isinstance(data.train, Images)
        assert not isinstance(data.test, Text)
        self.size, self.resolution = data.train.resolution, data.test.resolution
        pixels = data.train.pixels
        if config.crop == "shift":
            pixels = F.pad(pixels, (0, 0, *[config.shift] * 4))
        self.pixels = pixels.to(device)

    def _draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Draw the order, the crops, which images are mirrored, and seeds of RandAugment."""

        def integers(high: int) -> Tensor:
            return torch.randint(high, (self.count,), generator=self.generator)

        order = torch.randperm(self.count, generator=self.generator)
        if self.config.crop == "shift":
            shifts = 2 * self.config.shift + 1
            crops = torch.stack([integers(shifts), integers(shifts)], 1)
        else:
            uniform = torch.rand(self.count, DRAWS, dtype=torch.float64, generator=self.generator)
            height, width = self.pixels.shape[1:3]
            crops = random_boxes(uniform, height, width, self.config.smallest_crop)
        mirrored = integers(2 if self.config.flip else 1).bool()
        seeds = None
        if self.config.randaugment is not None:
            seeds = torch.randint(2**63 - 1, (self.count,), generator=self.generator)
        device = self.labels.device
        return (
            order.to(device, non_blocking=True),
            crops.to(device, non_blocking=True),
            mirrored.to(device, non_blocking=True),
            seeds,
        )

    def _load(
        self, drawn: tuple[Tensor, Tensor, Tensor, Tensor | None], parts: list[slice]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order, crops, mirrored, seeds = drawn
        grid = torch.arange(self.size, device=order.device)
        for part in parts:
            index = order[part]
            if self.config.crop == "shift":
                rows = crops[part, :1] + grid
                columns = torch.where(mirrored[part, None], self.size - 1 - grid, grid)
                columns = columns + crops[part, 1:]
                pixels = self.pixels[index[:, None, None], rows[:, :, None], columns[:, None, :]]
            else:
                pixels = resize_boxes(
                    self.pixels[index], crops[part], mirrored[part], self.resolution
                )
            if seeds is not None:
                pixels = self._augmented(pixels, seeds[part])
            yield self.normalize(pixels), self.labels[index]

    def _augmented(self, pixels: Tensor, seeds: Tensor) -> Tensor:
        """Apply RandAugment, which works on uint8 images one by one."""
        assert self.config.randaugment is not None
        if len(pixels) == 0:
            return pixels
        images = pixels.round().clamp(0, 255).to(torch.uint8)
        pairs = zip(images, seeds.tolist(), strict=True)
        magnitude = self.config.randaugment
        return torch.stack([rand_augment(image, magnitude, seed) for image, seed in pairs])


class EvalLoader(InOrder):
    """Evaluation batches; arguments as for `InOrder`.

    Example:
        >>> images = Images(torch.zeros(5, 8, 8, 1, dtype=torch.uint8), torch.arange(5))
        >>> data = Dataset("black", images, images, images, 5, (0.5,), (0.5,))
        >>> loader = EvalLoader(data, images, torch.device("cpu"), batch_size=3)
        >>> [y.tolist() for _, y in loader]
        [[0, 1, 2], [3, 4]]
    """

    def __init__(
        self,
        data: Dataset,
        images: Images,
        device: torch.device,
        batch_size: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(data, images, device, batch_size, **options)
        self.pixels = [images.pixels[part].to(device) for part in self.parts]

    def _load(self) -> Iterator[Tensor]:
        yield from self.pixels
