"""Loaders of images that worker processes decode and augment during training.

The main process draws a seed for the augmentation of each image. Batches are therefore bitwise
identical for any number of workers, and after a resume. Pixels are transferred as uint8.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..config import DataConfig
from ..errors import DataError
from .dataset import Dataset, EncodedImages
from .epochs import Epochs, InOrder

Order = tuple[np.ndarray, np.ndarray]  # indices and seeds of the images of a batch


class StreamTrainLoader(Epochs):
    """Shuffled training batches with random crops and mirroring.

    Arguments are as for `Epochs`; `workers` is the number of decoding processes.
    """

    def __init__(
        self,
        data: Dataset,
        config: DataConfig,
        batch_size: int,
        seed: int,
        device: torch.device,
        workers: int = 0,
        **options: Any,
    ) -> None:
        assert isinstance(data.train, EncodedImages)
        super().__init__(data, config, batch_size, seed, device, **options)
        self.decoder = Decoder(data.train, workers, device, keep_workers=True)

    def _draw(self) -> tuple[Tensor, Tensor]:
        order = torch.randperm(self.count, generator=self.generator)
        return order, torch.randint(2**63 - 1, (self.count,), generator=self.generator)

    def _load(
        self, drawn: tuple[Tensor, Tensor], parts: list[slice]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order, seeds = drawn
        orders = [(order[part].numpy(), seeds[part].numpy()) for part in parts]
        order = order.to(self.labels.device, non_blocking=True)
        for part, pixels in zip(parts, self.decoder(orders), strict=True):
            yield self.normalize(pixels), self.labels[order[part]]


class StreamEvalLoader(InOrder):
    """Evaluation batches.

    Arguments are as for `InOrder`; `workers` is the number of decoding processes.
    """

    def __init__(
        self,
        data: Dataset,
        images: EncodedImages,
        device: torch.device,
        batch_size: int = 128,
        workers: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(data, images, device, batch_size, **options)
        self.decoder = Decoder(images, workers, device, keep_workers=False)

    def _load(self) -> Iterator[Tensor]:
        indices = [np.arange(part.start, part.stop) for part in self.parts]
        return self.decoder([(index, np.zeros_like(index)) for index in indices])


class Decoder:
    """Decodes batches ahead of their use, in the order in which they are requested.

    Args:
        images: the encoded images.
        workers: number of decoding processes; 0 decodes in this process.
        device: where the batches are needed.
        keep_workers: whether the processes live on for the next epoch.
    """

    def __init__(
        self, images: EncodedImages, workers: int, device: torch.device, keep_workers: bool
    ) -> None:
        self.device = device
        self.orders: list[Order] = []
        self.loader = DataLoader(
            _Batches(images),
            batch_size=None,  # one worker decodes a whole batch
            sampler=self.orders,
            num_workers=workers,
            persistent_workers=keep_workers and workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # otherwise it draws from the global random state
            worker_init_fn=_ignore_signals,
        )

    def __call__(self, orders: list[Order]) -> Iterator[Tensor]:
        """Yield the pixels of each batch, uint8 (B, H, W, C).

        Args:
            orders: indices and seeds of the images of each batch.

        Raises:
            DataError: an image cannot be decoded, or a process has ended.
        """
        self.orders[:] = orders
        if not orders:
            return
        try:
            for pixels in self.loader:
                if isinstance(pixels, DataError):
                    raise pixels
                yield pixels.to(self.device, non_blocking=True)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            first = str(error).splitlines()[0]
            raise DataError(
                f"a process that decodes images has ended ({first}). If memory is low, set fewer "
                "system.workers."
            ) from None


class _Batches(TorchDataset[Tensor | DataError]):
    """Decodes batches in a worker. Errors are returned: raised, they would carry a traceback."""

    def __init__(self, images: EncodedImages) -> None:
        self.images = images

    def __getitem__(self, order: Order) -> Tensor | DataError:
        try:
            return self.images.load(*order)
        except DataError as error:
            return error


def _ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which may reach all processes, to the main process.

    A second SIGTERM ends the worker: it may come from the main process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
