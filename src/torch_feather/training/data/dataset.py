"""Training, validation and test data, and the facts about them that a network needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .files import ImageFiles
from .items import Items
from .normalize import Normalize
from .prepare import Augment, Center

Arrays = tuple[np.ndarray, np.ndarray]  # pixels (N, H, W, C), labels (N,)


@dataclass(frozen=True)
class Images:
    """Decoded images in memory.

    Attributes:
        pixels: uint8 (N, H, W, C).
        labels: int64 (N,).
        files: where the images are from; None if that is not known.

    Example:
        >>> images = Images(torch.zeros(3, 8, 8, 1, dtype=torch.uint8), torch.tensor([4, 5, 6]))
        >>> len(images), images.resolution, images.take(np.array([2, 0])).labels
        (3, 8, tensor([6, 4]))
    """

    pixels: Tensor
    labels: Tensor
    files: ImageFiles | Items | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def resolution(self) -> int:
        """Height of the images."""
        return self.pixels.shape[1]

    def take(self, index: np.ndarray) -> Images:
        """Return the images at `index`, in that order."""
        chosen = torch.from_numpy(index)
        files = None if self.files is None else self.files.take(index)
        return Images(self.pixels[chosen], self.labels[chosen], files)

    def first(self) -> Tensor:
        """Return one image: uint8 (1, H, W, C)."""
        return self.pixels[:1]


@dataclass(frozen=True)
class EncodedImages:
    """Images that are decoded and prepared each time they are used.

    Attributes:
        files: the encoded images.
        prepare: crops and scales a decoded image.
        resolution: height and width after preparation.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (20, 16), color=(255, 0, 0)).save(folder / "red.png")
        >>> names, spans = np.array([b"red.png"]), np.zeros((1, 3), int)
        >>> files = ImageFiles((folder,), names, spans, np.array([7]))
        >>> images = EncodedImages(files, Center(side=8, resolution=8), resolution=8)
        >>> images.first().shape, images.first()[0, 0, 0], images.labels
        (torch.Size([1, 8, 8, 3]), tensor([255, 0, 0], dtype=torch.uint8), tensor([7]))
    """

    files: ImageFiles | Items
    prepare: Center | Augment
    resolution: int

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> Tensor:
        """Labels of the images, int64 (N,)."""
        return torch.from_numpy(self.files.labels)

    def first(self) -> Tensor:
        """Return one image: uint8 (1, H, W, C)."""
        return self.load(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64))

    def load(self, index: np.ndarray, seeds: np.ndarray) -> Tensor:
        """Decode and prepare images.

        Args:
            index: indices of the images, int64 (B,).
            seeds: seeds of their random augmentations, int64 (B,).

        Returns:
            uint8 (B, H, W, C).
        """
        size = (self.resolution, self.resolution, self.files.channels)
        pixels = torch.empty(len(index), *size, dtype=torch.uint8)
        for target, i, seed in zip(pixels, index.tolist(), seeds.tolist(), strict=True):
            target.copy_(self.files.prepare(i, self.prepare, seed))
        return pixels


@dataclass(frozen=True)
class PreparedImages(EncodedImages):
    """Images that a data set of the user prepares for the network itself.

    Attributes:
        files: the items of the data set.
        prepare: not used.
        resolution: height of the images.

    Example:
        >>> items = Items([(torch.ones(1, 2, 3), 5)], "ones", np.arange(1), np.array([5]), 1, True)
        >>> PreparedImages(items, None, 2).first().shape
        torch.Size([1, 1, 2, 3])
    """

    files: Items
    prepare: None  # type: ignore[assignment]

    def load(self, index: np.ndarray, seeds: np.ndarray) -> Tensor:
        """Return images as the network receives them: float32 (B, C, H, W)."""
        loaded = [
            self.files.tensor(i, seed)
            for i, seed in zip(index.tolist(), seeds.tolist(), strict=True)
        ]
        shapes = {tuple(image.shape) for image in loaded}
        if len(shapes) > 1:
            raise self.files.error(
                int(index[0]), f"and others have several shapes, {sorted(shapes)}"
            )
        return torch.stack(loaded)


@dataclass(frozen=True)
class Text:
    """A part of a text as windows; the labels of a window are the characters that follow each.

    Attributes:
        ids: numbers of the characters, int64 (N,).
        length: characters of a window.

    Example:
        >>> text = Text(torch.arange(8), length=3)
        >>> len(text), text.windows(torch.tensor([0, 3])).tolist(), text.labels.tolist()
        (2, [[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """

    ids: Tensor
    length: int

    def __len__(self) -> int:
        return max(0, (len(self.ids) - 1) // self.length)

    @property
    def labels(self) -> Tensor:
        """Labels of the windows that follow one another, int64 (len(self), length)."""
        return self.ids[1 : len(self) * self.length + 1].view(-1, self.length)

    def windows(self, starts: Tensor) -> Tensor:
        """Return the windows that begin at positions, int64 (B,), as int64 (B, length)."""
        return self.ids[starts[:, None] + torch.arange(self.length, device=starts.device)]

    def first(self) -> Tensor:
        """Return one window: int64 (1, length)."""
        return self.ids[None, : self.length]


@dataclass(frozen=True)
class Dataset:
    """A data set of images, or a text, whose windows are called images too.

    Attributes:
        name: its name.
        train: training images.
        validation: validation images; empty if the whole training set is used for training.
        test: test images.
        classes: number of classes; of a text, of different characters.
        mean: mean per channel, of pixels scaled to [0, 1]; empty for a text.
        std: standard deviation per channel.
        class_names: names of the classes, in the order of their labels; empty if not known.
        prepared: whether the images are already as the network receives them, so that nothing is
            cropped, mirrored or normalized.

    Example:
        >>> images = Images(torch.full((2, 8, 8, 1), 255, dtype=torch.uint8), torch.tensor([0, 1]))
        >>> none = images.take(np.arange(0))
        >>> data = Dataset("white", images, none, images, classes=2, mean=(0.5,), std=(0.5,))
        >>> data.channels, data.example().shape, data.example().max().round()
        (1, torch.Size([1, 1, 8, 8]), tensor(1.))
    """

    name: str
    train: Images | EncodedImages | Text
    validation: Images | EncodedImages | Text
    test: Images | EncodedImages | Text
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    prepared: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; their numbers if the names are not known."""
        return self.class_names or tuple(map(str, range(self.classes)))

    @property
    def channels(self) -> int:
        """Number of channels of the images; 1 for a text."""
        return len(self.mean) or 1

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, so that its labels are numbers per class."""
        return self.train.labels.is_floating_point()

    def example(self) -> Tensor:
        """Return one image as the network receives it: float32 (1, C, H, W), or int64 (1, T)."""
        return self.normalize()(self.test.first())

    def normalize(
        self, device: torch.device | str = "cpu", channels_last: bool = True
    ) -> Normalize:
        """Return the conversion of images to the input of a network.

        Args:
            device: the device of the images.
            channels_last: memory format of the result.
        """
        return Normalize(self.mean, self.std, device, channels_last, self.prepared)


def split(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the training images, and of those held out for validation.

    Args:
        count: number of images.
        fraction: fraction of them to hold out.
        seed: determines the choice.

    Raises:
        DataError: no image is left for training.

    Example:
        >>> kept, held_out = split(10, 0.2, seed=0)
        >>> len(kept), len(held_out)
        (8, 2)
    """
    # RandomState: NumPy guarantees that its streams do not change between versions.
    order = np.random.RandomState(seed % 2**32).permutation(count)
    held_out = round(fraction * count)
    if held_out == count:
        raise DataError(f"data.validation={fraction} leaves no image for training")
    return (order[held_out:] if held_out else np.arange(count)), order[:held_out]
