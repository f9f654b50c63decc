"""Images and a small network to try fine-tuning with, if no others are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import install_hint
from .config import Config, resolve_config
from .data.digits import read_digits
from .errors import DataError, RunError, printable

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FIRST = 7  # classes of the network; the others are those to fine-tune on
SCALE = 4  # of the images: 32x32 pixels can be looked at


def write_example_images(folder: Path | str) -> tuple[Path, Path]:
    """Write scikit-learn's handwritten digits as two folders of images.

    Args:
        folder: a new or empty folder.

    Returns:
        The images of zero to six, for a network; and those of seven, eight and nine, to fine-tune
        it on. Both have `train/CLASS/IMAGE.png` and `val/CLASS/IMAGE.png`.

    Raises:
        RunError: the folder has files already, or cannot be written.
        DataError: scikit-learn or Pillow is not installed.

    Example:
        >>> import tempfile
        >>> from unittest import mock
        >>> few = np.zeros((10, 8, 8, 1), np.uint8), np.arange(10)
        >>> with mock.patch(f"{__name__}.read_digits", lambda path: (few, few)):
        ...     seven, three = write_example_images(tempfile.mkdtemp())
        >>> sorted(path.name for path in (three / "train").iterdir())
        ['eight', 'nine', 'seven']
    """
    root = Path(folder)
    train, test = read_digits(None)
    parts = (root / "digits-0-to-6", range(FIRST)), (root / "photos", range(FIRST, len(NAMES)))
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise RunError(f"{printable(root)}: is not empty. Choose another folder.")
        for target, labels in parts:
            for part, arrays in (("train", train), ("val", test)):
                _write(target / part, *arrays, labels)
    except OSError as error:
        raise RunError(f"{printable(root)}: cannot be written ({error.strerror})") from None
    return parts[0][0], parts[1][0]


def _write(folder: Path, pixels: np.ndarray, digits: np.ndarray, labels: Sequence[int]) -> None:
    try:
        from PIL import Image
    except ImportError:
        raise DataError(f"images require Pillow. {install_hint('train')}") from None
    for label in labels:
        target = folder / NAMES[label]
        target.mkdir(parents=True)
        for i in np.flatnonzero(digits == label).tolist():
            image = Image.fromarray(pixels[i, :, :, 0])
            side = SCALE * pixels.shape[1]
            image.resize((side, side), Image.Resampling.BICUBIC).save(target / f"{i:04}.png")


def example_config(images: Path) -> Config:
    """Return the configuration of the small network: dense, seven classes, 16x16 pixels.

    Args:
        images: the first folder of `write_example_images`.

    Example:
        >>> example_config(Path("a/digits-0-to-6")).method
        'dense'
    """
    settings = {
        "network": "resnet8",
        "method": "dense",
        "data.path": str(images.absolute()),
        "data.resolution": 16,
        "epochs": 5,
        "system.threads": 1,
        "system.tensorboard": False,
    }
    return resolve_config("finetune", overrides=settings)
