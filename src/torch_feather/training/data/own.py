"""Data sets of the user, named by an import path: `--data package.module:factory`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import ConfigurationError
from ...import_path import accepted, import_object
from ..config import DataConfig
from ..errors import DataError, printable
from .dataset import Dataset, PreparedImages, split
from .imagefolder import MEAN, STD, store
from .items import LABEL_KEYS, Items, is_prepared, kind, read_item, to_label, to_pixels

PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}


def load_own_data(config: DataConfig, seed: int) -> Dataset:
    """Return the data set that the factory `config.name` makes.

    The factory is called with `path`, the value of `--data-path`, if it takes this keyword. It
    returns (train, test), (train, validation, test), or a mapping of these names. Each part is a
    map-style data set of (image, label). Without a part for validation, `data.validation` holds out
    training images. Without a part for tests, that for validation is used.

    Args:
        config: the data set.
        seed: determines the validation images that are held out.

    Raises:
        DataError: the factory fails, or returns something else.
        ConfigurationError: it cannot be imported.

    Example:
        >>> config = DataConfig("torch_feather.training.data.own:striped")
        >>> data = load_own_data(config, seed=0)
        >>> len(data.train), len(data.validation), data.classes, data.example().shape
        (36, 4, 2, torch.Size([1, 1, 8, 8]))
    """
    parts = call_factory(config)
    train = _items(parts["train"], f"{config.name}, train")
    test = _items(parts["test"], f"{config.name}, test", like=train)
    count, names = _classes(train, test)
    own = parts.get("validation") if config.validation > 0 else None
    if own is not None:
        kept, validation = np.arange(len(train)), _items(own, f"{config.name}, validation", train)
    else:
        kept, held_out = split(len(train), config.validation, seed)
        validation = train.take(held_out)
    for part in (train, validation, test):
        _check_labels(part, count)
    if train.prepared:
        resolution = len(train.tensor(0)[0])
        stored: Any = [
            PreparedImages(items, None, resolution)
            for items in (train.take(kept), validation, test)
        ]
    else:
        if config.storage == "auto" and train.is_random():  # in memory, they would not be
            config = replace(config, storage="stream")
        stored = store(config, train, kept, validation, test)
    mean, std = moments(config, train.channels)
    if len(mean) != train.channels:
        raise DataError(
            f"data.mean and data.std must have {train.channels} numbers, one per channel, got "
            f"{config.mean}"
        )
    training, held, evaluation = stored
    return Dataset(config.name, training, held, evaluation, count, mean, std, names, train.prepared)


def moments(config: DataConfig, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel: those of ImageNet for three channels.

    Args:
        config: the data set; its `mean` and `std` are returned if they are set.
        channels: number of channels.

    Example:
        >>> moments(DataConfig(), channels=1)
        ((0.5,), (0.5,))
    """
    usual = (MEAN, STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    return tuple(config.mean or usual[0]), tuple(config.std or usual[1])


def call_factory(config: DataConfig) -> dict[str, Any]:
    """Call the factory of a data set.

    Args:
        config: the data set.

    Returns:
        The parts by name: `train`, `test` and perhaps `validation`.

    Raises:
        DataError: the factory fails, or returns something else.
        ConfigurationError: it cannot be imported.

    Example:
        >>> list(call_factory(DataConfig("torch_feather.training.data.own:striped")))
        ['train', 'test']
    """
    factory = import_object(config.name, "Data set")
    arguments = accepted(factory, {"path": config.path})
    if config.path is not None and not arguments:
        raise DataError(f"{config.name} takes no keyword path. Remove --data-path.")
    try:
        made = factory(**arguments)
    except (DataError, ConfigurationError):
        raise
    except Exception as error:  # of the user's code
        first = printable((str(error).splitlines() or [""])[0])
        raise DataError(
            f"{config.name}: the factory failed ({type(error).__name__}: {first})"
        ) from error
    parts: dict[str, Any] = {}
    if isinstance(made, Mapping):
        for name, spellings in PARTS.items():
            found = next((key for key in spellings if key in made), None)
            if found is not None:
                parts[name] = made[found]
    elif isinstance(made, tuple | list) and len(made) in (2, 3):
        names = ("train", "test") if len(made) == 2 else ("train", "validation", "test")
        parts = dict(zip(names, made, strict=True))
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    if not {"train", "test"} <= parts.keys():
        given = f"the keys {', '.join(map(str, made))}" if isinstance(made, Mapping) else kind(made)
        raise DataError(
            f"{config.name}: the factory returned {given}. Return the data sets (train, test), "
            "(train, validation, test), or a mapping of these names."
        )
    for name, part in parts.items():
        if not hasattr(part, "__getitem__") or not hasattr(part, "__len__"):
            raise DataError(
                f"{config.name}, {name}: is {kind(part)}, which has no length and positions. "
                "Return a map-style data set; read a stream into a list."
            )
        if len(part) == 0:
            raise DataError(f"{config.name}, {name}: has no images")
    return parts


def striped(count: int = 40) -> tuple[Any, Any]:
    """Return a data set for examples: images with horizontal or vertical stripes.

    Args:
        count: number of training images; there are half as many test images.

    Example:
        >>> train, test = striped()
        >>> len(train), train[1][0].shape, train[1][1]
        (40, (8, 8), 1)
    """
    stripes = np.tile(np.array([0, 200], np.uint8), (8, 4))

    def make(number: int, first: int) -> list[tuple[np.ndarray, int]]:
        seeds = range(first, first + number)
        noise = [np.random.RandomState(s).randint(0, 50, (8, 8), np.uint8) for s in seeds]
        return [((stripes.T if s % 2 else stripes) + noise[s - first], s % 2) for s in seeds]

    return make(count, 0), make(count // 2, count)


def _items(data: Any, name: str, like: Items | None = None) -> Items:
    """Return the items of a part, with their labels."""
    image, _ = read_item(data, 0, name)
    prepared = is_prepared(image) if like is None else like.prepared
    if prepared:
        channels = len(image) if is_prepared(image) else 0
    else:
        channels = to_pixels(image, f"{name}, image 0").shape[2]
    channels = channels if like is None else like.channels
    classes = _names(data) if like is None else like.classes
    index = np.arange(len(data))
    return Items(data, name, index, _labels(data, name), channels, prepared, classes)


def _labels(data: Any, name: str) -> np.ndarray:
    """Return all labels: as the data set lists them, otherwise by reading every item."""
    labels = _listed(data)
    if labels is None:
        labels = [read_item(data, i, name)[1] for i in range(len(data))]
    found = [to_label(label, f"{name}, image {i}") for i, label in enumerate(labels)]
    shapes = {label.shape for label in found}
    if len(shapes) > 1:
        raise DataError(f"{name}: the labels have several shapes, {sorted(shapes)}")
    return np.stack(found)


def _listed(data: Any) -> Any:
    """Return the labels that a data set of torchvision, torch or Hugging Face lists, or None."""
    columns = getattr(data, "column_names", None)
    if isinstance(columns, list):
        return next((data[key][:] for key in LABEL_KEYS if key in columns), None)
    if getattr(data, "target_transform", None) is not None:
        return None
    tensors: Any = getattr(data, "tensors", ())
    labels = getattr(data, "targets", tensors[1] if len(tensors) == 2 else None)
    if labels is None or len(labels) != len(data) or not _plain(labels):
        return None
    return labels


def _plain(labels: Any) -> bool:
    try:
        return np.asarray(labels).dtype.kind in "biuf"
    except (ValueError, RuntimeError, TypeError):
        return False


def _names(data: Any) -> tuple[str, ...]:
    """Return the names of the classes that a data set lists; empty if it does not."""
    features = getattr(data, "features", None)
    found: Any = getattr(data, "classes", None)
    if isinstance(features, Mapping):
        key = next((key for key in LABEL_KEYS if key in features), "")
        feature = features.get(key)
        found = getattr(feature, "names", getattr(getattr(feature, "feature", None), "names", None))
    if isinstance(found, list | tuple) and found:
        return tuple(printable(name) for name in found)
    return ()


def _classes(train: Items, test: Items) -> tuple[int, tuple[str, ...]]:
    """Return the number of classes and their names."""
    if train.labels.ndim == 2:
        count = train.labels.shape[1]
    elif train.classes:
        count = len(train.classes)
    else:
        count = int(max(train.labels.max(), test.labels.max())) + 1
    if count < 2 and train.labels.ndim == 1:
        raise DataError(f"{train.name}: has one class. Classification requires at least two.")
    return count, train.classes if len(train.classes) == count else ()


def _check_labels(items: Items, classes: int) -> None:
    labels = items.labels
    if labels.ndim == 2:
        if labels.shape[1] != classes:
            raise DataError(f"{items.name}: has {labels.shape[1]} labels per image, not {classes}")
        return
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise items.error(
            int(wrong[0]), f"has the label {labels[wrong[0]]}, but labels are 0 to {classes - 1}"
        )
