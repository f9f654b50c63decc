"""Images with several labels each, listed in CSV files: `train.csv` and `val.csv` in a folder.

image,cat,dog               image,labels
photos/a.jpg,1,0     or     photos/a.jpg,cat
photos/b.jpg,1,1            photos/b.jpg,cat;dog
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ...errors import nearest, some
from ..errors import DataError, printable
from .files import ImageFiles
from .names import Names
from .regular import read_regular
from .tar_index import is_image

EVALUATION = ("val.csv", "validation.csv", "test.csv")
LARGEST = 512 * 2**20  # bytes of a CSV file
LISTS = ("label", "labels")  # names of a second column that lists classes
SEPARATOR = ";"


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
        root: a folder with `train.csv` and `val.csv`. The first column is the path of an image
            within the folder. Either there is a column for each class, with values 0 and 1; or a
            second column `labels` with the names of the classes, such as `cat;dog`.

    Raises:
        DataError: a file is missing; a line is wrong, and the message names it; or the folder has
            an image that no file lists.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> (root / "a.jpg").touch(), (root / "b.jpg").touch()
        (None, None)
        >>> _ = (root / "train.csv").write_text("image,cat,dog\\na.jpg,1,1\\n")
        >>> _ = (root / "val.csv").write_text("image,cat,dog\\nb.jpg,0,1\\n")
        >>> train, evaluation, classes = find_csv_images(root)
        >>> train.labels.tolist(), evaluation.labels.tolist(), train.classes, classes
        ([[1.0, 1.0]], [[0.0, 1.0]], ('cat', 'dog'), 2)
    """
    found = [name for name in EVALUATION if (root / name).is_file()]
    if not found:
        raise DataError(
            f"{printable(root)}: has train.csv, but none of {', '.join(EVALUATION)}. Accuracy is "
            "measured on its images: move some lines of train.csv to val.csv."
        )
    train = _read(root, root / "train.csv")
    test = _read(root, root / found[0], train)
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes)) or train.classes
        raise DataError(
            f"{printable(root)}: train.csv and {found[0]} have different classes, or in another "
            f"order: {some(list(differing))}"
        )
    listed = {*train.lines, *test.lines}
    for other in found[1:]:  # not used, but their images are not forgotten either
        listed |= {str(PurePosixPath(row[0].strip())) for _, row in _rows(root / other)}
    _check_all_listed(root, listed)
    return _to_files(root, train), _to_files(root, test), len(train.classes)


class _Table(NamedTuple):
    """The content of a CSV file: names of classes, and by image its labels and its line."""

    path: Path
    classes: tuple[str, ...]
    labels: dict[str, list[float]]
    lines: dict[str, int]


def _read(root: Path, path: Path, train: _Table | None = None) -> _Table:
    """Return a table; that of the training images names the classes of a list of labels."""
    rows = _rows(path)
    header = [printable(name.strip()) for name in next(rows, (0, []))[1]]
    as_list = len(header) == 2 and header[1].lower() in LISTS
    classes = tuple(header[1:])
    if not classes or len(set(classes)) < len(classes) or "" in classes:
        raise DataError(
            f"{printable(path)}: the first line must be 'image' and the names of the classes, "
            f"which differ, or 'image,labels'; got {', '.join(header)!r:.80}"
        )
    lines: dict[str, int] = {}
    cells: list[tuple[int, list[str]]] = []
    for line, row in rows:
        where = f"{printable(path)}, line {line}"
        if len(row) != len(header):
            raise DataError(f"{where}: has {len(row)} values, but the first line {len(header)}")
        name = _image_name(root, where, row[0].strip())
        for other, taken in ((path, lines), (train and train.path, train and train.lines)):
            if taken and name in taken:
                listed = f"in line {taken[name]} of {other.name}" if other else ""
                raise DataError(f"{where}: {printable(name)} is listed twice, also {listed}")
        lines[name] = line
        cells.append((line, [value.strip() for value in row[1:]]))
    if not lines:
        raise DataError(f"{printable(path)}: lists no images")
    if as_list:
        classes, labels = _from_lists(path, cells, train and train.classes)
    else:
        labels = [_from_columns(path, line, values) for line, values in cells]
    return _Table(path, classes, dict(zip(lines, labels, strict=True)), lines)


def _image_name(root: Path, where: str, name: str) -> str:
    """Return the path of an image in one spelling, after a check."""
    steps = PurePosixPath(name)
    if not name or steps.is_absolute() or ".." in steps.parts or "\0" in name:
        raise DataError(f"{where}: {printable(name)!r} is no path within the folder")
    if not (root / name).is_file():
        raise DataError(f"{where}: there is no image {printable(root / name)}")
    return str(steps)


def _from_columns(path: Path, line: int, values: list[str]) -> list[float]:
    if wrong := [value for value in values if value not in ("0", "1", "0.0", "1.0")]:
        raise DataError(
            f"{printable(path)}, line {line}: a label must be 0 or 1, got "
            f"{printable(wrong[0])!r:.40}"
        )
    return [float(value) for value in values]


def _from_lists(
    path: Path, cells: list[tuple[int, list[str]]], known: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[list[float]]]:
    """Return the classes and the labels of cells such as `cat;dog`; an empty one has no class."""
    found: list[tuple[int, list[str]]] = []
    for line, (cell,) in cells:
        names = [printable(name.strip()) for name in cell.split(SEPARATOR)] if cell else []
        where = f"{printable(path)}, line {line}"
        if "" in names or len(set(names)) < len(names):
            raise DataError(
                f"{where}: labels must be different names between '{SEPARATOR}', got {cell!r:.80}"
            )
        for name in names:
            if known and name not in known:
                hint = nearest(name, known).rstrip(".")
                raise DataError(f"{where}: no image of train.csv has the label {name!r}{hint}")
        found.append((line, names))
    classes = known or tuple(sorted({name for _, names in found for name in names}))
    if not classes:
        raise DataError(f"{printable(path)}: no image has a label")
    return classes, [[float(one in names) for one in classes] for _, names in found]


def _check_all_listed(root: Path, listed: set[str]) -> None:
    """Raise an error for images of the folder that no file lists. Hidden ones are ignored."""
    missing = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        within = PurePosixPath(os.path.relpath(folder, root))
        missing += [
            printable(within / name)
            for name in sorted(files)
            if is_image(name) and str(within / name) not in listed
        ]
    if missing:
        raise DataError(
            f"{printable(root)}: no CSV file lists {some(missing)}. Add lines for them, or move "
            "them to another folder."
        )


def _to_files(root: Path, table: _Table) -> ImageFiles:
    return ImageFiles(
        (root,),
        Names(os.fsencode(name) for name in table.lines),
        np.zeros((len(table.lines), 3), np.int64),
        np.array(list(table.labels.values()), np.float32),
        table.classes,
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
