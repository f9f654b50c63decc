"""Images with several labels each, listed in CSV files: `train.csv` and `val.csv` in a folder.

image,cat,dog
photos/a.jpg,1,0
photos/b.jpg,1,1
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from ...errors import some
from ..errors import DataError, printable
from .files import ImageFiles
from .names import Names
from .regular import read_regular

EVALUATION = ("val.csv", "validation.csv", "test.csv")
LARGEST = 512 * 2**20  # bytes of a CSV file


def has_csv_labels(root: Path) -> bool:
    """Whether a folder lists its training images in a CSV file.

    Args:
        root: the folder.

    Example:
        >>> has_csv_labels(Path("absent"))
        False
    """
    return (root / "train.csv").is_file()


def find_csv_images(root: Path) -> tuple[ImageFiles, ImageFiles, int]:
    """Return the training images, the evaluation images and the number of classes.

    Args:
        root: a folder with `train.csv` and `val.csv`. The first line names the classes, after a
            column for the path of an image within the folder. All values are 0 or 1.

    Raises:
        DataError: a file is missing, or a line is wrong; the message names it.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "a.jpg").touch(), (root / "b.jpg").touch()
        (None, None)
        >>> for name in ("train.csv", "val.csv"):
        ...     _ = (root / name).write_text("image,cat,dog\\na.jpg,1,1\\nb.jpg,0,1\\n")
        >>> train, _, classes = find_csv_images(root)
        >>> train.labels.tolist(), train.classes, classes
        ([[1.0, 1.0], [0.0, 1.0]], ('cat', 'dog'), 2)
    """
    found = next((name for name in EVALUATION if (root / name).is_file()), None)
    if found is None:
        raise DataError(
            f"{printable(root)}: has train.csv, but none of {', '.join(EVALUATION)}. Accuracy is "
            "measured on its images: move some lines of train.csv to val.csv."
        )
    train, test = (_read(root, root / name) for name in ("train.csv", found))
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes)) or train.classes
        raise DataError(
            f"{printable(root)}: train.csv and {found} have different classes, or in another "
            f"order: {some(list(differing))}"
        )
    return train, test, len(train.classes)


def _read(root: Path, path: Path) -> ImageFiles:
    rows = _rows(path)
    header = next(rows, (0, []))[1]
    classes = tuple(printable(name.strip()) for name in header[1:])
    if not classes or len(set(classes)) < len(classes) or "" in classes:
        raise DataError(
            f"{printable(path)}: the first line must be 'image' and the names of the classes, "
            f"which differ; got {', '.join(header)!r:.80}"
        )
    names: dict[str, list[float]] = {}
    for line, row in rows:
        where = f"{printable(path)}, line {line}"
        if len(row) != len(header):
            raise DataError(f"{where}: has {len(row)} values, but the first line {len(header)}")
        name, values = row[0].strip(), [value.strip() for value in row[1:]]
        steps = PurePosixPath(name)
        if not name or steps.is_absolute() or ".." in steps.parts or "\0" in name:
            raise DataError(f"{where}: {printable(name)!r} is no path within the folder")
        if wrong := [value for value in values if value not in ("0", "1", "0.0", "1.0")]:
            raise DataError(f"{where}: a label must be 0 or 1, got {printable(wrong[0])!r:.40}")
        if name in names:
            raise DataError(f"{where}: {printable(name)} is listed twice")
        if not (root / name).is_file():
            raise DataError(f"{where}: there is no image {printable(root / name)}")
        names[name] = [float(value) for value in values]
    if not names:
        raise DataError(f"{printable(path)}: lists no images")
    return ImageFiles(
        (root,),
        Names(os.fsencode(name) for name in names),
        np.zeros((len(names), 3), np.int64),
        np.array(list(names.values()), np.float32),
        classes,
    )


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines that are not empty, with their numbers."""
    try:
        content = read_regular(path)
        if len(content) > LARGEST:
            raise DataError(f"{printable(path)}: larger than {LARGEST // 2**20} MiB")
        reader = csv.reader(content.decode("utf-8-sig").splitlines(), strict=True)
        for row in reader:
            if row:
                yield reader.line_num, row
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{printable(path)}: cannot be read as CSV ({error})") from None
