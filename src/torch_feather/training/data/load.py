"""Load the data set of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...errors import some
from ...import_path import is_import_path
from ..config import DataConfig
from ..errors import DataError
from .cifar import CLASSES, cifar
from .dataset import Arrays, Dataset, Images, split
from .digits import read_digits
from .find import find_images
from .imagefolder import MEAN, STD, load_image_folder
from .own import call_factory, load_own_data, moments
from .text import load_text


@dataclass(frozen=True)
class _Source:
    """A data set with fixed classes and normalization.

    Attributes:
        read: reads training and test images from a path.
        classes: names of the classes.
        mean: mean per channel, of pixels scaled to [0, 1].
        std: standard deviation per channel.
    """

    read: Callable[[str | None], tuple[Arrays, Arrays]]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
SOURCES = {
    "digits": _Source(read_digits, tuple("0123456789"), (0.288,), (0.354,)),
    "cifar10": _Source(
        cifar("cifar10", "label", 10),
        tuple(CLASSES["cifar10"].split()),
        CIFAR_MEAN,
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": _Source(
        cifar("cifar100", "fine_label", 100),
        tuple(CLASSES["cifar100"].split()),
        CIFAR_MEAN,
        (0.2023, 0.1994, 0.2010),
    ),
}


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Read a data set, scale it to the resolution, and hold out validation images.

    Args:
        config: the data set.
        seed: determines the validation images.

    Raises:
        DataError: files are missing, corrupt or truncated, or are of another data set.

    Example:
        >>> data = load_dataset(DataConfig("digits", validation=0.1), seed=0)
        >>> len(data.train), len(data.validation), len(data.test)
        (1294, 144, 359)
    """
    if config.name == "imagefolder":
        data = load_image_folder(config, seed)
        return replace(data, class_names=class_names(config, data.class_names))
    if is_import_path(config.name):
        data = load_own_data(config, seed)
        return replace(data, class_names=class_names(config, data.names))
    if config.name == "text":
        return load_text(config)
    source = SOURCES[config.name]
    train, test = (Images(*_to_tensors(part, config)) for part in source.read(config.path))
    kept, held_out = split(len(train), config.validation, seed)
    return Dataset(
        config.name,
        train.take(kept) if len(held_out) else train,
        train.take(held_out),
        test,
        len(source.classes),
        *normalization(config),
        class_names(config, source.classes),
    )


def count_training_images(config: DataConfig, seed: int) -> int:
    """Return the number of training images. Folders are listed, without decoding an image.

    Args:
        config: the data set.
        seed: determines the validation images.

    Raises:
        DataError: as for `load_dataset`.

    Example:
        >>> count_training_images(DataConfig("digits", validation=0.0), seed=0)
        1438
    """
    if is_import_path(config.name):
        parts = call_factory(config)
        count, own = len(parts["train"]), "validation" in parts
        return count if own else len(split(count, config.validation, seed)[0])
    if config.name != "imagefolder":
        return len(load_dataset(config, seed).train)
    return len(split(len(find_images(config.path)[0]), config.validation, seed)[0])


def normalization(
    config: DataConfig, channels: int = 3
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, of pixels scaled to [0, 1].

    Args:
        config: the data set.
        channels: number of channels, of a data set of the user.

    Example:
        >>> normalization(DataConfig("digits"))
        ((0.288,), (0.354,))
    """
    if config.name == "imagefolder":
        return tuple(config.mean or MEAN), tuple(config.std or STD)
    if is_import_path(config.name):
        return moments(config, channels)
    if config.name == "text":
        return (), ()
    return SOURCES[config.name].mean, SOURCES[config.name].std


def class_names(config: DataConfig, found: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the classes. Classes that only have numbers can be given names.

    Args:
        config: the settings of the data set.
        found: names of the classes that it has.

    Raises:
        DataError: the settings name other classes than the data set has.

    Example:
        >>> class_names(DataConfig(class_names=["zero", "one"]), ("0", "1"))
        ('zero', 'one')
    """
    given = tuple(config.class_names or found)
    if given == found or (len(given) == len(found) and all(name.isdecimal() for name in found)):
        return given
    others = [name for name in found if name not in given] or found
    raise DataError(
        f"data.class_names has {some(given)}, but {config.title} has {some(others)}. Remove "
        "data.class_names from the settings, or choose the data that they belong to."
    )


def _to_tensors(part: Arrays, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Convert to tensors, averaged over blocks of pixels if `config` sets a resolution."""
    pixels, labels = part
    size = pixels.shape[1]
    if config.resolution is not None and config.resolution != size:
        factor, rest = divmod(size, config.resolution)
        if rest or factor < 1:
            raise DataError(
                f"data.resolution must be a divisor of {size}, the resolution of {config.name}; "
                f"got {config.resolution}"
            )
        corners = [(i, j) for i in range(factor) for j in range(factor)]
        total = sum(pixels[:, i::factor, j::factor].astype(np.uint16) for i, j in corners)
        pixels = ((total + factor**2 // 2) // factor**2).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(labels)
