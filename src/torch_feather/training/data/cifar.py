"""CIFAR-10 and CIFAR-100, from parquet files or from the official archive."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import DataError
from .cache import cached, version
from .dataset import Arrays


def cifar(name: str, label: str, classes: int) -> Callable[[str | None], tuple[Arrays, Arrays]]:
    """Return a function that reads the training and the test images from a folder.

    Args:
        name: `cifar10` or `cifar100`.
        label: name of the labels' column in parquet files.
        classes: number of classes.

    Returns:
        Function of a path. It raises DataError if files are missing or damaged, or are of another
        data set.

    Example:
        >>> read = cifar("cifar10", "label", classes=10)
        >>> try:
        ...     (train_pixels, train_labels), (test_pixels, test_labels) = read("DATA/absent")
        ... except DataError as error:
        ...     print(error)
        DATA/absent: no such folder. Set --data-path to the folder of cifar10.
    """
    archive = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]

    def read(path: str | None) -> tuple[Arrays, Arrays]:
        if path is None:
            raise DataError(
                f"{name} requires --data-path: the folder of its parquet files or archive"
            )
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder. Set --data-path to the folder of {name}.")
        if folder.name == archive:
            folder = folder.parent
        if any(folder.glob("*.parquet")):
            train, test = (_shards(folder, part) for part in ("train", "test"))
            return _parquet(name, train, label, classes), _parquet(name, test, label, classes)
        if (folder / archive).is_dir():
            return _read_archive(folder, name)
        raise DataError(
            f"{folder}: found neither train*.parquet and test*.parquet nor {archive}/. "
            f"Set --data-path to the folder of {name}."
        )

    return read


def _shards(folder: Path, split: str) -> list[Path]:
    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise DataError(f"{folder}: has no {split}*.parquet")
    for file in files:
        numbered = re.search(r"-of-(\d+)\.parquet$", file.name)
        if numbered and int(numbered.group(1)) != len(files):
            raise DataError(
                f"{folder}: has {len(files)} of {int(numbered.group(1))} {split} files, according "
                f"to {file.name}. Download the missing files."
            )
    return files


def _parquet(name: str, files: list[Path], label: str, classes: int) -> Arrays:
    read = partial(_read_parquet, files, label, classes)
    arrays = cached(name, [version(file) for file in files], read)
    return arrays["pixels"], arrays["labels"]


def _read_parquet(files: list[Path], label: str, classes: int) -> dict[str, np.ndarray]:
    """Read the columns `img` {bytes, path} and `label`, as on the Hugging Face hub."""
    try:
        import pyarrow
        import pyarrow.parquet
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"parquet files require {error.name}. Run pip install 'torch-feather[train]'."
        ) from None
    pixels: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for file in files:
        try:
            table = pyarrow.parquet.read_table(file)
        except (pyarrow.ArrowException, OSError) as error:
            first = str(error).strip().splitlines()[0]
            raise DataError(f"{file}: not a readable parquet file ({first})") from None
        if not {"img", label} <= set(table.column_names):
            raise DataError(
                f"{file}: expected the columns img and {label}, "
                f"found {', '.join(table.column_names)}"
            )
        for row, cell in enumerate(table.column("img")):
            try:
                image = Image.open(io.BytesIO(cell.as_py()["bytes"])).convert("RGB")
            except (OSError, ValueError, TypeError, KeyError, SyntaxError):
                raise DataError(f"{file}: the image in row {row} cannot be decoded") from None
            pixels.append(np.asarray(image))
            if pixels[-1].shape != pixels[0].shape or image.width != image.height:
                raise DataError(
                    f"{file}: the image in row {row} has {image.width}x{image.height} pixels, "
                    "but all images must be squares of one size"
                )
        if table.num_rows == 0:
            raise DataError(f"{file}: has no images")
        column = table.column(label).to_numpy()
        if column.dtype.kind not in "iu" or ((column < 0) | (column >= classes)).any():
            raise DataError(f"{file}: {label} must hold integers from 0 to {classes - 1}")
        labels.append(column.astype(np.int64))
    return {"pixels": np.stack(pixels), "labels": np.concatenate(labels)}


def _read_archive(folder: Path, name: str) -> tuple[Arrays, Arrays]:
    """Read the unpacked official archive with torchvision, which verifies MD5 checksums."""
    try:
        from torchvision.datasets import CIFAR10, CIFAR100
    except ImportError:
        raise DataError(
            "the CIFAR archive requires torchvision. Run pip install 'torch-feather[vision]'."
        ) from None
    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        parts = [cls(str(folder), train=train, download=False) for train in (True, False)]
    except Exception:  # unpickling a damaged file may raise anything
        raise DataError(
            f"{folder}: the {name} archive is incomplete or damaged (torchvision's checksums). "
            "Unpack it again."
        ) from None
    train, test = ((p.data, np.asarray(p.targets, dtype=np.int64)) for p in parts)
    return train, test
