"""Image folders and tar files: kept in memory if they fit, otherwise decoded during training."""

from __future__ import annotations

import numpy as np
import torch

from ..config import DataConfig
from ..errors import DataError, printable
from .cache import cached
from .dataset import Dataset, EncodedImages, Images, split
from .files import ImageFiles
from .find import find_images
from .images import VERSION
from .items import Items
from .prepare import Augment, Center

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
RESOLUTION = 224  # default of streamed images
MEMORY = 4 * 2**30  # largest number of bytes that `auto` keeps in memory

Source = ImageFiles | Items
Parts = tuple[Images, Images, Images] | tuple[EncodedImages, EncodedImages, EncodedImages]


class _MemoryStorageError(DataError):
    """The images cannot be stored in one array in memory."""


def load_image_folder(config: DataConfig, seed: int) -> Dataset:
    """Load an image folder. Validation images are held out of its training images.

    Args:
        config: path, resolution, crop and storage.
        seed: determines the validation images.

    Raises:
        DataError: the layout is not supported, an image cannot be decoded, or images of several
            sizes should be kept in memory without scaling.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png"):
        ...     (root / name).parent.mkdir(parents=True)
        ...     Image.new("RGB", (10, 8)).save(root / name)
        >>> options = {"validation": 0.0, "resolution": 8, "storage": "stream"}
        >>> data = load_image_folder(DataConfig("imagefolder", path=str(root), **options), seed=0)
        >>> len(data.train), data.classes, data.example().shape
        (2, 2, torch.Size([1, 3, 8, 8]))
    """
    train, test, classes = find_images(config.path)
    kept, held_out = split(len(train), config.validation, seed)
    training, validation, evaluation = store(config, train, kept, train.take(held_out), test)
    mean, std = tuple(config.mean or MEAN), tuple(config.std or STD)
    if len(mean) != 3:
        raise DataError(f"data.mean and data.std must have 3 numbers, got {config.mean}")
    names = tuple(map(printable, train.classes))
    return Dataset(config.name, training, validation, evaluation, classes, mean, std, names)


def store(
    config: DataConfig, train: Source, kept: np.ndarray, validation: Source, test: Source
) -> Parts:
    """Return training, validation and test images: decoded if they fit in memory.

    Args:
        config: resolution, crop and storage.
        train: all training images.
        kept: indices of those to train on.
        validation: images for validation; none of those at `kept`.
        test: test images.

    Raises:
        DataError: an image cannot be decoded, or images of several sizes should be kept in memory
            without scaling.

    Example:
        >>> from .items import Items
        >>> images = [(np.zeros((8, 8), np.uint8), i % 2) for i in range(4)]
        >>> items = Items(images, "zeros", np.arange(4), np.arange(4) % 2, channels=1)
        >>> none = items.take(np.arange(0))
        >>> train, _, test = store(DataConfig(), items, np.arange(3), none, items)
        >>> train.pixels.shape, len(test)
        (torch.Size([3, 8, 8, 1]), 4)
    """
    try:
        if config.storage == "stream":
            raise _MemoryStorageError
        return _in_memory(config, train, kept, validation, test)
    except _MemoryStorageError:
        if config.storage == "memory":
            raise
        return _streamed(config, train.take(kept), validation, test)


def center_crop(config: DataConfig, resolution: int) -> Center:
    """Return the preparation for evaluation.

    Args:
        config: the data set.
        resolution: height and width of the result.

    Example:
        >>> center_crop(DataConfig("imagefolder", crop="resized"), 224)
        Center(side=256, resolution=224)
    """
    fraction = config.center or (0.875 if config.crop == "resized" else 1.0)
    return Center(round(resolution / fraction), resolution)


def _streamed(
    config: DataConfig, train: Source, validation: Source, test: Source
) -> tuple[EncodedImages, EncodedImages, EncodedImages]:
    resolution = config.resolution or RESOLUTION
    center = center_crop(config, resolution)
    return (
        EncodedImages(train, Augment(config, resolution), resolution),
        EncodedImages(validation, center, resolution),
        EncodedImages(test, center, resolution),
    )


def _in_memory(
    config: DataConfig, train: Source, kept: np.ndarray, validation: Source, test: Source
) -> tuple[Images, Images, Images]:
    """Decode training images before their crop, and the others as for evaluation."""
    height, width, channels = train.decode(0).shape
    resolution = config.resolution
    if resolution is None:
        if height != width:
            raise _MemoryStorageError(
                f"{printable(train.path(0))}: {width}x{height} pixels are not square. Set "
                "data.resolution."
            )
        resolution = height
    ready = None  # keep the stored size
    if config.crop == "shift" and config.resolution is not None:
        ready = Center(resolution, resolution)
        height = width = resolution
    needed = (len(train) * height * width + len(test) * resolution**2) * channels
    if config.storage == "auto" and needed > MEMORY:
        raise _MemoryStorageError
    center = center_crop(config, resolution)
    every = Images(_kept("train", train, ready), torch.from_numpy(train.labels), train)
    return (
        every.take(kept) if len(kept) < len(train) else every,
        # Decoded again: evaluation prepares images in another way.
        Images(
            torch.from_numpy(_decode(validation, center)),
            torch.from_numpy(validation.labels),
            validation,
        ),
        Images(_kept("test", test, center), torch.from_numpy(test.labels), test),
    )


def _kept(part: str, files: Source, ready: Center | None) -> torch.Tensor:
    """Return decoded images, from the cache if possible."""
    if isinstance(files, Items):
        return torch.from_numpy(_decode(files, ready))
    arrays = cached(
        f"imagefolder-{part}",
        [VERSION, files.version(), repr(ready)],
        lambda: {"pixels": _decode(files, ready)},
    )
    return torch.from_numpy(arrays["pixels"])


def _decode(files: Source, ready: Center | None) -> np.ndarray:
    """Decode images to uint8 (N, H, W, C)."""
    size = (ready.resolution, ready.resolution, files.channels) if ready else None
    shape = size or tuple(files.decode(0).shape)
    pixels = np.empty((len(files), *shape), dtype=np.uint8)
    for i in range(len(files)):
        image = files.decode(i) if ready is None else files.prepare(i, ready)
        if image.shape != shape:
            sizes = [f"{width}x{height}" for height, width, _ in (image.shape, shape)]
            raise _MemoryStorageError(
                f"{printable(files.path(i))} has {sizes[0]} pixels, but "
                f"{printable(files.path(0))} has {sizes[1]}. For images of several sizes set "
                "data.storage=stream, or data.crop=shift and data.resolution."
            )
        pixels[i] = image
    return pixels
