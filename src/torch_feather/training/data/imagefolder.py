"""Image folders and tar files, in memory where they fit, else decoded as they are needed."""

from __future__ import annotations

import numpy as np
import torch

from ..config import DataConfig
from ..errors import DataError
from .cache import cached
from .dataset import Dataset, EncodedImages, Images, split
from .files import ImageFiles
from .find import find_images
from .prepare import Augment, Center

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as is usual
RESOLUTION = 224  # where nothing else is asked for
MEMORY = 4 * 2**30  # bytes of pixels that `auto` keeps

Parts = tuple[Images, Images, Images] | tuple[EncodedImages, EncodedImages, EncodedImages]


class CannotKeep(DataError):  # noqa: N818
    """Images that do not go into one array in memory."""


def load_image_folder(config: DataConfig, seed: int) -> Dataset:
    """The part for evaluation is the test set; validation images are held out of the other.

    Raises:
        DataError: a layout that is not understood, an image that cannot be decoded, images of
            several sizes that are to be kept at their stored size.
    """
    train, test, classes = find_images(config.path)
    kept, held_out = split(len(train), config.validation, seed)
    try:
        if config.storage == "stream":
            raise CannotKeep
        parts: Parts = _in_memory(config, train, kept, held_out, test)
    except CannotKeep:
        if config.storage == "memory":
            raise
        parts = _streamed(config, train.take(kept), train.take(held_out), test)
    training, validation, evaluation = parts
    return Dataset(config.name, training, validation, evaluation, classes, MEAN, STD)


def _center(config: DataConfig, resolution: int) -> Center:
    """What evaluation sees."""
    share = config.center or (0.875 if config.crop == "resized" else 1.0)
    return Center(round(resolution / share), resolution)


def _streamed(
    config: DataConfig, train: ImageFiles, validation: ImageFiles, test: ImageFiles
) -> tuple[EncodedImages, EncodedImages, EncodedImages]:
    resolution = config.resolution or RESOLUTION
    center = _center(config, resolution)
    return (
        EncodedImages(train, Augment(config, resolution), resolution),
        EncodedImages(validation, center, resolution),
        EncodedImages(test, center, resolution),
    )


def _in_memory(
    config: DataConfig, train: ImageFiles, kept: np.ndarray, held_out: np.ndarray, test: ImageFiles
) -> tuple[Images, Images, Images]:
    """Training images ready for their crop; the others as evaluation sees them."""
    height, width, channels = train.decode(0).shape
    resolution = config.resolution
    if resolution is None:
        if height != width:
            raise CannotKeep(
                f"{train.path(0)}: {width}x{height} pixels are no square; set data.resolution"
            )
        resolution = height
    ready = None  # at the stored size
    if config.crop == "shift" and config.resolution is not None:
        ready = Center(resolution, resolution)
        height = width = resolution
    needed = (len(train) * height * width + len(test) * resolution**2) * channels
    if config.storage == "auto" and needed > MEMORY:
        raise CannotKeep
    center = _center(config, resolution)
    every = Images(_kept("train", train, ready), torch.from_numpy(train.labels))
    # Those held out come from the files again: they see what evaluation does.
    held = train.take(held_out)
    validation = Images(torch.from_numpy(_decode(held, center)), torch.from_numpy(held.labels))
    return (
        every.take(kept) if len(held_out) else every,
        validation,
        Images(_kept("test", test, center), torch.from_numpy(test.labels)),
    )


def _kept(part: str, files: ImageFiles, ready: Center | None) -> torch.Tensor:
    """Decoded once, then from the cache."""
    arrays = cached(
        f"imagefolder-{part}",
        [files.version(), repr(ready)],
        lambda: {"pixels": _decode(files, ready)},
    )
    return torch.from_numpy(arrays["pixels"])


def _decode(files: ImageFiles, ready: Center | None) -> np.ndarray:
    """uint8 (N, H, W, C)."""
    shape = (ready.resolution, ready.resolution, 3) if ready else tuple(files.decode(0).shape)
    pixels = np.empty((len(files), *shape), dtype=np.uint8)
    for i in range(len(files)):
        image = files.decode(i)
        if ready is not None:
            image = ready(image)
        elif image.shape != shape:
            sizes = [f"{width}x{height}" for height, width, _ in (image.shape, shape)]
            raise CannotKeep(
                f"{files.path(i)} has {sizes[0]} pixels and {files.path(0)} {sizes[1]}; images of "
                "several sizes need data.storage stream, or data.crop shift and a data.resolution"
            )
        pixels[i] = image
    return pixels
