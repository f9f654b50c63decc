"""Loaders of images that worker processes decode and augment during training.

The main process draws a seed for the augmentation of each image. Batches are therefore bitwise
identical for any number of workers, and after a resume. Pixels are transferred as uint8.
"""

from __future__ import annotations

import atexit
import signal
import weakref
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

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from .files import ImageFiles
        >>> from .prepare import Augment
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (10, 8)).save(folder / "a.png")
        >>> names, spans = np.array([b"a.png"] * 3), np.zeros((3, 3), int)
        >>> files = ImageFiles((folder,), names, spans, np.arange(3))
        >>> images = EncodedImages(files, Augment(DataConfig(), 8), resolution=8)
        >>> data = Dataset("black", images, images, images, 3, (0.5,) * 3, (0.5,) * 3)
        >>> loader = StreamTrainLoader(data, DataConfig(), 2, 0, torch.device("cpu"))
        >>> [batch.x.shape for batch in loader]
        [torch.Size([2, 3, 8, 8]), torch.Size([1, 3, 8, 8])]
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
        self.decoder = _Decoder(data.train, workers, device, keep_workers=True)

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

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from .files import ImageFiles
        >>> from .prepare import Center
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (10, 8)).save(folder / "a.png")
        >>> names, spans = np.array([b"a.png"] * 3), np.zeros((3, 3), int)
        >>> files = ImageFiles((folder,), names, spans, np.arange(3))
        >>> images = EncodedImages(files, Center(8, 8), resolution=8)
        >>> data = Dataset("black", images, images, images, 3, (0.5,) * 3, (0.5,) * 3)
        >>> loader = StreamEvalLoader(data, images, torch.device("cpu"), batch_size=2)
        >>> [y.tolist() for _, y in loader]
        [[0, 1], [2]]
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
        self.decoder = _Decoder(images, workers, device, keep_workers=False)

    def _load(self) -> Iterator[Tensor]:
        indices = [np.arange(part.start, part.stop) for part in self.parts]
        return self.decoder([(index, np.zeros_like(index)) for index in indices])


class _Decoder:
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
        _open.add(self)

    def close(self) -> None:
        """End the processes. The next batches start new ones."""
        # PyTorch has no public function for this.
        stop = getattr(self.loader._iterator, "_shutdown_workers", None)
        if stop is not None:
            stop()
        self.loader._iterator = None

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
        except DataError:
            self.close()
            raise
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            first = str(error).splitlines()[0]
            raise DataError(
                f"a process that decodes images has ended ({first}). If memory is low, set fewer "
                "system.workers."
            ) from None


_open: weakref.WeakSet[_Decoder] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End the processes before Python waits for them, such as after an error in training.

    Python sends them SIGTERM, which they leave to the main process.
    """
    for decoder in list(_open):
        decoder.close()


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
