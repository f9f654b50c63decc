"""Batches of images that worker processes decode and augment while the network trains.

What is random about an image follows from a seed that the main process draws for it, so neither
the number of workers nor the place where a run was resumed changes a bit. Pixels travel as uint8.
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
    """Shuffled batches, cropped and mirrored."""

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
    """The images of one set in order."""

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
        places = [np.arange(part.start, part.stop) for part in self.parts]
        return self.decoder([(index, np.zeros_like(index)) for index in places])


class Decoder:
    """Batches of pixels on the device, decoded ahead in the order in which they are asked for."""

    def __init__(
        self, images: EncodedImages, workers: int, device: torch.device, keep_workers: bool
    ) -> None:
        self.device = device
        self.orders: list[Order] = []
        self.loader = DataLoader(
            _Batches(images),
            batch_size=None,  # a batch is decoded by one worker, in one piece
            sampler=self.orders,
            num_workers=workers,
            persistent_workers=keep_workers and workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the network's
            worker_init_fn=_leave_requests,
        )

    def __call__(self, orders: list[Order]) -> Iterator[Tensor]:
        """uint8 (B, H, W, C) for each of `orders`. Raises `DataError`."""
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
                f"a process that decodes images has ended ({first}); if memory is short, take "
                "fewer system.workers"
            ) from None


class _Batches(TorchDataset[Tensor | DataError]):
    """What workers do. An error is handed over rather than raised, to arrive without its stack."""

    def __init__(self, images: EncodedImages) -> None:
        self.images = images

    def __getitem__(self, order: Order) -> Tensor | DataError:
        try:
            return self.images.load(*order)
        except DataError as error:
            return error


def _leave_requests(worker: int) -> None:
    """Ctrl-C and SIGTERM may reach all processes; what to do about it is up to the main one.

    A second SIGTERM is obeyed: it may be the main process that ends a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
