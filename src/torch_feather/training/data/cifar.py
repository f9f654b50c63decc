"""CIFAR-10 and CIFAR-100, from parquet files or from the official archive."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import install_hint
from ..errors import DataError, printable
from .cache import cached, version
from .dataset import Arrays
from .images import VERSION, decode_image
from .regular import open_regular
from .shards import complete_shards

MEMORY = 4 * 2**30  # largest number of bytes of pixels
CLASSES = {  # the names of the data sets' authors, in the order of their labels
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """,
}
ROWS = 64  # rows of a parquet file to decode at a time


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
    files = complete_shards(folder, split, "parquet")
    if not files:
        raise DataError(f"{printable(folder)}: has no {split}*.parquet")
    return files


def _parquet(name: str, files: list[Path], label: str, classes: int) -> Arrays:
    read = partial(_read_parquet, files, label, classes)
    arrays = cached(name, [VERSION, *(version(file) for file in files)], read)
    return arrays["pixels"], arrays["labels"]


def _read_parquet(files: list[Path], label: str, classes: int) -> dict[str, np.ndarray]:
    """Read the columns `img` {bytes, path} and `label`, as on the Hugging Face hub."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DataError(f"parquet files require {error.name}. {install_hint('train')}") from None
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for file in files:
        for row, (content, number) in enumerate(_rows(file, label, classes)):
            where = f"{printable(file)}: the image in row {row}"
            try:
                image = decode_image(content)
            except ValueError as error:
                raise DataError(f"{where} cannot be decoded ({error})") from None
            if image.shape[0] != image.shape[1] or (pixels and image.shape != pixels[0].shape):
                raise DataError(
                    f"{where} has {image.shape[1]}x{image.shape[0]} pixels, but all images must be "
                    "squares of one size"
                )
            if (len(pixels) + 1) * image.size > MEMORY:
                raise DataError(f"{where} is more than the {MEMORY:,} bytes of pixels allowed")
            if not 0 <= number < classes:
                raise DataError(
                    f"{printable(file)}: {label} must hold integers from 0 to {classes - 1}"
                )
            pixels.append(image)
            labels.append(number)
    return {"pixels": np.stack(pixels), "labels": np.array(labels, dtype=np.int64)}


def _rows(file: Path, label: str, classes: int) -> Iterator[tuple[bytes, int]]:
    """Yield the encoded image and the label of each row of a parquet file.

    The file is read in batches of few rows, because a few bytes can encode many equal rows.
    """
    import pyarrow
    import pyarrow.parquet

    os.close(open_regular(file)[0])
    count = 0
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as parquet:
            names = parquet.schema_arrow.names
            if not {"img", label} <= set(names):
                raise DataError(
                    f"{printable(file)}: expected the columns img and {label}, "
                    f"found {', '.join(map(printable, names[:20]))}"
                )
            if parquet.metadata.num_rows == 0:
                raise DataError(f"{printable(file)}: has no images")
            if not pyarrow.types.is_integer(parquet.schema_arrow.field(label).type):
                raise DataError(
                    f"{printable(file)}: {label} must hold integers from 0 to {classes - 1}"
                )
            for batch in parquet.iter_batches(ROWS, columns=["img.bytes", label]):
                for cell, number in zip(batch["img"], batch[label], strict=True):
                    content = (cell.as_py() or {}).get("bytes")
                    if not isinstance(content, bytes) or not number.is_valid:
                        missing = "image" if number.is_valid else "label"
                        raise DataError(f"{printable(file)}: row {count} has no {missing}")
                    count += 1
                    yield content, number.as_py()
            if count != parquet.metadata.num_rows:
                raise DataError(
                    f"{printable(file)}: has {count} rows instead of {parquet.metadata.num_rows}"
                )
    except DataError:
        raise
    except Exception as error:  # a damaged file may raise anything
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{printable(file)}: not a readable parquet file ({printable(first)})"
        ) from None


def _read_archive(folder: Path, name: str) -> tuple[Arrays, Arrays]:
    """Read the unpacked official archive with torchvision, which verifies MD5 checksums."""
    try:
        from torchvision.datasets import CIFAR10, CIFAR100
    except ImportError:
        raise DataError(
            f"the CIFAR archive requires torchvision. {install_hint('vision')}"
        ) from None
    cls = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    for file in (folder / cls.base_folder).iterdir():
        os.close(open_regular(file)[0])
    try:
        parts = [cls(str(folder), train=train, download=False) for train in (True, False)]
    except Exception:  # unpickling a damaged file may raise anything
        raise DataError(
            f"{folder}: the {name} archive is incomplete or damaged (torchvision's checksums). "
            "Unpack it again."
        ) from None
    train, test = ((p.data, np.asarray(p.targets, dtype=np.int64)) for p in parts)
    return train, test
