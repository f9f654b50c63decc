"""The order of batches, and where a run stands in it.

All randomness of an epoch is drawn at its beginning, on the CPU whatever device trains, so the
state of one generator and a position say everything that a resumed run has to know. Every rank
draws the same and takes its own part of each batch.
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
from .dataset import Dataset, EncodedImages, Images
from .normalize import Normalize


class Batch(NamedTuple):
    """One rank's part of a training batch; it may be empty."""

    x: Tensor  # float32 (B, C, H, W)
    y: Tensor  # int64 (B,)
    total: int  # images of the whole batch, over all ranks


class Epochs(ABC):
    """Shuffled batches, one epoch per iteration.

    Iterating goes on in the middle of an epoch where the last iteration, or the one whose state was
    loaded, was left.
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
                f"{self.count} training images fill no batch of {batch_size}; choose a smaller "
                "batch_size, or set data.drop_last to false"
            )
        size = data.train.resolution
        if config.crop == "shift" and config.shift >= size:
            raise DataError(f"data.shift {config.shift} moves all of {size} pixels away")
        self.labels = data.train.labels.to(device)
        self.normalize = Normalize(data.mean, data.std, device, channels_last)
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
        """Everything random of an epoch, from `self.generator`."""

    @abstractmethod
    def _load(self, drawn: Any, parts: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels of each of `parts`, which are slices of the epoch's order."""

    def state_dict(self) -> dict[str, Any]:
        """The generator at the beginning of the current epoch, and the batches given since."""
        return {"generator": self.epoch_start, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.generator.set_state(state["generator"])
        self.epoch_start = self.generator.get_state()
        self.position = state["position"]


class InOrder(ABC):
    """The images of one set in order, unchanged, as batches (x, y); each rank has its own part."""

    def __init__(
        self,
        data: Dataset,
        images: Images | EncodedImages,
        device: torch.device,
        batch_size: int,
        channels_last: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        own = (ranks or Ranks()).part(0, len(images))
        starts = range(own.start, own.stop, batch_size)
        self.parts = [slice(start, min(start + batch_size, own.stop)) for start in starts]
        self.labels = images.labels.to(device)
        self.normalize = Normalize(data.mean, data.std, device, channels_last)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part, pixels in zip(self.parts, self._load(), strict=True):
            yield self.normalize(pixels), self.labels[part]

    @abstractmethod
    def _load(self) -> Iterator[Tensor]:
        """The pixels of each of `parts`, on the device."""
