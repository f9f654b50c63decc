"""Base classes of the loaders: the order of batches, and a position that can be resumed.

All random numbers of an epoch are drawn on the CPU when it begins. The state of one generator and a
position are therefore enough to resume. All ranks draw the same numbers, and each takes its part of
every batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import DataConfig
from ..distributed import Ranks
from ..errors import DataError
from .dataset import Dataset, EncodedImages, Images, Text


class Batch(NamedTuple):
    """One rank's part of a training batch; it may be empty.

    Attributes:
        x: images, float32 (B, C, H, W); windows of a text, int64 (B, T).
        y: labels, int64 (B,), (B, T), or float32 (B, classes).
        total: number of images of the whole batch, over all ranks.

    Example:
        >>> batch = Batch(torch.zeros(2, 1, 8, 8), torch.tensor([3, 7]), total=4)
        >>> len(batch.y) / batch.total  # this rank's fraction
        0.5
    """

    x: Tensor
    y: Tensor
    total: int


class Epochs(ABC):
    """Shuffled training batches; each iteration is an epoch.

    An iteration that was left is resumed at its position by the next one, also after
    `load_state_dict`.

    Args:
        data: the data set.
        config: crops and mirroring.
        batch_size: images per batch, over all ranks.
        seed: determines order and augmentation.
        device: where the batches are needed.
        channels_last: memory format of the images.
        ranks: the processes that train together.

    Raises:
        DataError: no batch is full, or crops are shifted beyond the image.

    Example:
        >>> class InTurn(Epochs):
        ...     def _draw(self):
        ...         return torch.arange(self.count)
        ...     def _load(self, drawn, parts):
        ...         for part in parts:
        ...             yield torch.zeros(0), self.labels[drawn[part]]
        >>> images = Images(torch.zeros(5, 8, 8, 1, dtype=torch.uint8), torch.arange(5))
        >>> data = Dataset("black", images, images, images, 5, (0.5,), (0.5,))
        >>> loader = InTurn(data, DataConfig(), 2, seed=0, device=torch.device("cpu"))
        >>> first = next(iter(loader))
        >>> [batch.y.tolist() for batch in loader]  # the rest of the epoch
        [[2, 3], [4]]
    """

    def __init__(
        self,
        data: Dataset,
        config: DataConfig,
        batch_size: int,
        seed: int,
        device: torch.device,
        channels_last: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.count, self.batch_size = len(data.train), batch_size
        self.ranks = ranks or Ranks()
        self.batches = self.count // batch_size
        if not config.drop_last and self.count % batch_size:
            self.batches += 1
        if self.batches == 0:
            raise DataError(
                f"{self.count} training images do not fill a batch of {batch_size}. Choose a "
                "smaller batch_size, or set data.drop_last=false."
            )
        if config.crop == "shift" and not data.prepared:
            assert not isinstance(data.train, Text)
            size = data.train.resolution
            if config.shift >= size:
                raise DataError(
                    f"data.shift must be below the resolution {size}, got {config.shift}"
                )
        self.labels = data.train.labels.to(device)
        self.normalize = data.normalize(device, channels_last)
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch_start = self.generator.get_state()
        self.position = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        self.generator.set_state(self.epoch_start)
        drawn = self._draw()
        starts = range(self.position * self.batch_size, self.count, self.batch_size)
        ends = [min(start + self.batch_size, self.count) for start in starts]
        whole = list(zip(starts, ends, strict=True))[: self.batches - self.position]
        parts = [self.ranks.part(start, end) for start, end in whole]
        loaded = self._load(drawn, parts)
        for (x, y), (start, end) in zip(loaded, whole, strict=True):
            self.position += 1
            yield Batch(x, y, end - start)
        self.position = 0
        self.epoch_start = self.generator.get_state()

    @abstractmethod
    def _draw(self) -> Any:
        """Draw all random numbers of an epoch from `self.generator`."""

    @abstractmethod
    def _load(self, drawn: Any, parts: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of each part, a slice of the order of the epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state at the start of the epoch, and the batches since then."""
        return {"generator": self.epoch_start, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of `state`."""
        self.generator.set_state(state["generator"])
        self.epoch_start = self.generator.get_state()
        self.position = state["position"]


class InOrder(ABC):
    """Evaluation batches (x, y): images in order, without augmentation, a part for each rank.

    Args:
        data: the data set.
        images: its images to evaluate.
        device: where the batches are needed.
        batch_size: images per batch of a rank.
        channels_last: memory format of the images.
        ranks: the processes that evaluate together.

    Example:
        >>> class InMemory(InOrder):
        ...     def _load(self):
        ...         return iter(images.pixels[part] for part in self.parts)
        >>> images = Images(torch.zeros(5, 8, 8, 1, dtype=torch.uint8), torch.arange(5))
        >>> data = Dataset("black", images, images, images, 5, (0.5,), (0.5,))
        >>> loader = InMemory(data, images, torch.device("cpu"), batch_size=3)
        >>> [(x.shape, y.tolist()) for x, y in loader]
        [(torch.Size([3, 1, 8, 8]), [0, 1, 2]), (torch.Size([2, 1, 8, 8]), [3, 4])]
    """

    def __init__(
        self,
        data: Dataset,
        images: Images | EncodedImages | Text,
        device: torch.device,
        batch_size: int,
        channels_last: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        own = (ranks or Ranks()).part(0, len(images))
        starts = range(own.start, own.stop, batch_size)
        self.parts = [slice(start, min(start + batch_size, own.stop)) for start in starts]
        self.labels = images.labels.to(device)
        self.normalize = data.normalize(device, channels_last)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part, pixels in zip(self.parts, self._load(), strict=True):
            yield self.normalize(pixels), self.labels[part]

    @abstractmethod
    def _load(self) -> Iterator[Tensor]:
        """Yield the pixels of each of `parts`, on the device."""
