"""The items of a map-style data set of the user: (image, label), or a mapping with both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, printable
from .seeds import seeded

IMAGE_KEYS, LABEL_KEYS = ("image", "img", "pixel_values"), ("label", "labels", "fine_label")


@dataclass(frozen=True)
class Items:
    """Images of a map-style data set, by position. Same interface as `ImageFiles`.

    Random numbers of the data set are seeded for each image, so that a run is reproducible for any
    number of processes that decode images.

    Attributes:
        data: the data set; `data[i]` is an item.
        name: its name, for messages.
        index: positions of the images in `data`, int64 (N,).
        labels: int64 (N,), or float32 (N, classes) of zeros and ones.
        channels: number of channels of the images.
        prepared: whether images are float tensors for the network, instead of pixels.
        classes: names of the classes, in the order of their labels.

    Example:
        >>> data = [(np.full((2, 3), 9, np.uint8), 1)]
        >>> Items(data, "nines", np.arange(1), np.array([1]), channels=1).decode(0).shape
        torch.Size([2, 3, 1])
    """

    data: Any
    name: str
    index: np.ndarray
    labels: np.ndarray
    channels: int
    prepared: bool = False
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> Items:
        """Return the images at `index`, in that order."""
        return replace(self, index=self.index[index], labels=self.labels[index])

    def path(self, i: int) -> str:
        """Return a name of an image, for messages."""
        return f"{self.name}, image {self.index[i]}"

    def error(self, i: int, problem: str) -> DataError:
        """Return an error of an image."""
        return DataError(f"{self.path(i)}: {problem}")

    def item(self, i: int, seed: int = 0) -> tuple[Any, Any]:
        """Return an image and its label.

        Raises:
            DataError: the data set fails, or has another label than before.
        """
        image, label = read_item(self.data, int(self.index[i]), self.name, seed)
        if not np.array_equal(to_label(label, self.path(i)), self.labels[i]):
            raise self.error(i, f"has the label {label!r:.40}, but had {self.labels[i]} before")
        return image, label

    def decode(self, i: int, seed: int = 0) -> Tensor:
        """Return the pixels of an image, uint8 (H, W, C).

        Raises:
            DataError: it is no image, or has another number of channels; the message names it.
        """
        pixels = to_pixels(self.item(i, seed)[0], self.path(i), self.channels)
        if pixels.shape[2] != self.channels:
            problem = f"has {pixels.shape[2]} channels, the first image {self.channels}"
            raise self.error(i, f"{problem}. Convert all images to one mode, such as RGB.")
        return pixels

    def tensor(self, i: int, seed: int = 0) -> Tensor:
        """Return an image that the data set prepared, float32 (C, H, W).

        Raises:
            DataError: it is no float tensor of that shape; the message names it.
        """
        image = self.item(i, seed)[0]
        if not is_prepared(image) or len(image) != self.channels:
            raise self.error(
                i, f"is {kind(image)}, but the first image was a float tensor (C, H, W)"
            )
        return image.float()

    def prepare(self, i: int, prepare: Callable[[Tensor, int], Tensor], seed: int = 0) -> Tensor:
        """Return the decoded image `i` after `prepare`.

        Raises:
            DataError: the image cannot be decoded or prepared; the message names it.
        """
        pixels = self.decode(i, seed)
        try:
            return prepare(pixels, seed)
        except DataError as error:
            raise self.error(i, str(error)) from None

    def read(self, i: int) -> bytes:
        """Return the bytes of an image, for a digest."""
        return (self.tensor(i) if self.prepared else self.decode(i)).numpy().tobytes()

    def is_random(self) -> bool:
        """Whether the data set returns other images for other random numbers."""
        return self._differs(0, 1)

    def is_verifiable(self) -> bool:
        """Whether the data set returns the same images again for the same random numbers."""
        return not self._differs(0, 0)

    def _differs(self, first: int, second: int) -> bool:
        shown = range(min(3, len(self)))
        return any(
            not torch.equal(*(_comparable(self.item(i, seed)[0]) for seed in (first, second)))
            for i in shown
        )


def read_item(data: Any, i: int, name: str, seed: int = 0) -> tuple[Any, Any]:
    """Return image and label of an item.

    Args:
        data: a map-style data set.
        i: position of the item.
        name: name of the data set, for messages.
        seed: seed of the random numbers that the data set uses.

    Raises:
        DataError: the data set fails, or the item is no pair of image and label.

    Example:
        >>> read_item([{"image": "pixels", "label": 3}], 0, "example")
        ('pixels', 3)
    """
    try:
        with seeded(seed):
            item = data[i]
    except DataError:
        raise
    except Exception as error:  # of the user's code
        first = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{name}, image {i}: the data set fails ({type(error).__name__}: {printable(first)})"
        ) from error
    if isinstance(item, Mapping):
        found = [next((k for k in keys if k in item), None) for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if None not in found:
            return item[found[0]], item[found[1]]
        problem = f"has the keys {', '.join(map(str, item))}; expected image and label"
    elif isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
        return item[0], item[1]
    else:
        problem = f"is {kind(item)}; expected a pair (image, label)"
    raise DataError(f"{name}, image {i}: {problem}. Wrap the data set so that it returns a pair.")


def kind(value: Any) -> str:
    """Return type and shape of a value, for messages.

    Args:
        value: anything.

    Example:
        >>> kind(torch.zeros(2, 3)), kind("text")
        ('a Tensor of torch.float32 (2, 3)', 'a str')
    """
    shape = getattr(value, "shape", None)
    if shape is None or not hasattr(value, "dtype"):
        return f"a {type(value).__name__}"
    return f"a {type(value).__name__} of {value.dtype} {tuple(shape)}"


def is_prepared(image: Any) -> bool:
    """Whether an image is a float tensor (C, H, W), as transforms for a network return it.

    Args:
        image: an image of an item.

    Example:
        >>> is_prepared(torch.zeros(3, 8, 8)), is_prepared(np.zeros((8, 8), np.uint8))
        (True, False)
    """
    return isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3


def to_pixels(image: Any, where: str, channels: int | None = None) -> Tensor:
    """Return an image as uint8 (H, W, C).

    Args:
        image: an image of Pillow; an array (H, W) or (H, W, C); or a tensor (H, W) or (C, H, W);
            arrays and tensors of uint8.
        where: which image it is, for messages.
        channels: the number of channels to return for images of Pillow; None keeps grey images
            grey.

    Raises:
        DataError: it is none of these.

    Example:
        >>> to_pixels(torch.zeros(3, 4, 5, dtype=torch.uint8), "example").shape
        torch.Size([4, 5, 3])
    """
    if hasattr(image, "convert") and hasattr(image, "mode"):
        from .images import rgb_pixels

        try:
            pixels = torch.from_numpy(rgb_pixels(image))
        except ValueError as error:
            raise DataError(f"{where}: cannot be used as an image ({error})") from None
        grey = image.mode in ("1", "L") or image.mode.startswith("I;16")
        return pixels[:, :, :1] if grey and channels in (None, 1) else pixels
    if isinstance(image, Tensor) and image.dtype == torch.uint8:
        tensor = image[None] if image.ndim == 2 else image
        if tensor.ndim == 3 and len(tensor) in (1, 3):
            return tensor.permute(1, 2, 0).contiguous()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        array = image[:, :, None] if image.ndim == 2 else image
        if array.ndim == 3 and array.shape[2] in (1, 3):
            return torch.from_numpy(np.ascontiguousarray(array))
    raise DataError(
        f"{where}: is {kind(image)}; expected an image of Pillow, uint8 as an array (H, W, C) or a "
        "tensor (C, H, W), or a float tensor (C, H, W) that is ready for the network."
    )


def to_label(label: Any, where: str) -> np.ndarray | np.integer[Any]:
    """Return a label as int64, or as float32 (classes,) for several labels per image.

    Args:
        label: an integer; or zeros and ones, one per class.
        where: which image it is of, for messages.

    Raises:
        DataError: it is neither.

    Example:
        >>> to_label(3, "example"), to_label([1, 0], "example")
        (np.int64(3), array([1., 0.], dtype=float32))
    """
    try:
        array = label.numpy() if isinstance(label, Tensor) else np.asarray(label)
    except (ValueError, RuntimeError, TypeError):
        array = np.asarray("")
    if array.ndim == 0 and array.dtype.kind in "iu":
        return np.int64(array)
    if array.ndim == 1 and array.dtype.kind in "biuf" and ((array == 0) | (array == 1)).all():
        return array.astype(np.float32)
    raise DataError(
        f"{where}: the label is {label!r:.40}; expected the number of a class, or zeros and ones, "
        "one per class."
    )


def _comparable(image: Any) -> Tensor:
    return image if is_prepared(image) else to_pixels(image, "")
