"""Find images and their classes in folders and tar files.

A folder or tar file has the paths `train/CLASS/IMAGE` and `val/CLASS/IMAGE`. Alternatively, a
folder has the tar files train*.tar and val*.tar with paths `CLASS/IMAGE`, or with pairs `KEY.jpg`
and `KEY.cls` (the number of the class). `valid`, `validation` and `test` are accepted in
place of `val`. A folder with `train.csv` and `val.csv` lists images with several labels each.
"""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import some, warn
from ..errors import DataError, printable
from .csv_labels import find_csv_images, has_csv_labels
from .files import SUFFIXES, ImageFiles, image_error
from .names import Names
from .shards import complete_shards
from .tar_index import is_image, is_other_image, steps, tar_index

HELD_BACK = ("val", "valid", "validation", "test")  # accepted names of the evaluation images
PARTS = ("train", *HELD_BACK)
LAYOUT = (
    "a folder with train/ and val/, each with a folder of images per class; a tar file of such a "
    "folder; or a folder with train*.tar and val*.tar"
)

Identity = tuple[int, int] | str  # of a folder, whatever its path


class _Entry(NamedTuple):
    """One image. Entries are sorted by class and path, alike in folders and tar files.

    Attributes:
        kind: its class: a name, the first step of `below`, or a number.
        below: path within the part.
        container: index of the folder or tar file.
        name: path within the container.
        offset: first byte in a tar file.
        size: bytes in a tar file.
    """

    kind: str | int
    below: tuple[str, ...]
    container: int
    name: str
    offset: int = 0
    size: int = 0


def find_images(path: str | None) -> tuple[ImageFiles, ImageFiles, int]:
    """Return the training images, the evaluation images and the number of classes.

    Args:
        path: a folder or tar file with one of the layouts above.

    Raises:
        DataError: the layout is not supported, or the parts have different classes.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png"):
        ...     (root / name).parent.mkdir(parents=True)
        ...     (root / name).touch()  # images are decoded later
        >>> train, evaluation, classes = find_images(str(root))
        >>> train.names.tolist(), train.labels.tolist(), classes
        ([b'train/cat/a.png', b'train/dog/b.png'], [0, 1], 2)
    """
    if path is None:
        raise DataError(f"imagefolder requires --data-path: {LAYOUT}")
    root = Path(path).expanduser()
    containers: tuple[Path, ...] = (root,)
    if has_csv_labels(root):
        return find_csv_images(root)
    if root.is_file():
        found = _in_tar(_no_zip(root), 0)
    elif not root.is_dir():
        raise DataError(f"{printable(root)}: no such file or folder. Set --data-path to {LAYOUT}.")
    elif (root / "train").is_dir():
        present = [part for part in PARTS if (root / part).is_dir() or (root / part).is_symlink()]
        found = (pair for part in present for pair in _in_folder(root, part))
    else:
        shards = [(file, part) for part in PARTS for file in complete_shards(root, part, "tar")]
        containers = tuple(file for file, _ in shards)
        found = (pair for i, (file, part) in enumerate(shards) for pair in _in_tar(file, i, part))
    parts: dict[str, list[_Entry]] = {}
    unread: list[str] = []
    outside: list[str] = []
    for part, entry in found:
        if not part:
            outside.append(printable(containers[entry.container] / entry.name))
        elif is_image(*entry.below):
            parts.setdefault(part, []).append(entry)
        else:
            unread.append(printable(containers[entry.container] / entry.name))
    _warn_of(unread, outside)
    if "train" not in parts:
        raise DataError(f"{printable(root)}: {_why_no_training_images(root)}")
    held_back = next((part for part in HELD_BACK if part in parts), None)
    if held_back is None:
        raise DataError(
            f"{printable(root)}: no images in {', '.join(HELD_BACK[:-1])} or {HELD_BACK[-1]}. "
            "Accuracy is measured on them: move some images of each class, such as every fifth, "
            "from train/CLASS to val/CLASS."
        )
    _check_labels(containers, parts["train"] + parts[held_back])
    classes = _common_classes(root, held_back, parts["train"], parts[held_back])
    train, test = (_to_files(containers, parts[part], classes) for part in ("train", held_back))
    return train, test, len(classes)


def _no_zip(file: Path) -> Path:
    """Return a file, if it is not a zip file."""
    with file.open("rb") as opened:
        if opened.read(4) == b"PK\3\4":
            raise DataError(
                f"{printable(file)}: a zip file. Unpack it, and set --data-path to the folder that "
                "has train/ and val/."
            )
    return file


def _warn_of(unread: list[str], outside: list[str]) -> None:
    if outside:
        warn(
            f"{some(outside, 1)}: in none of the folders {', '.join(PARTS)}, so not read. Move "
            "images of a data set there."
        )
    if unread:
        warn(
            f"{some(unread, 1)}: images of this format are not read. Convert them to one of "
            f"{', '.join(SUFFIXES)}, or remove them."
        )


def _why_no_training_images(root: Path) -> str:
    """Return what is missing, and what to do: most often, folders of classes are not divided."""
    if (root / "train").is_dir():
        return "no images in train/CLASS/. Put a folder of images for each class there."
    classes = []
    if root.is_dir():
        classes = [
            printable(entry.name)
            for entry in sorted(root.iterdir())
            if entry.is_dir() and any(map(is_image, os.listdir(entry)))
        ]
    if classes:
        return (
            f"has folders of images ({some(classes)}), but not in train/ and val/. Move most "
            "images of each class to train/CLASS and the others, such as every fifth, to val/CLASS."
        )
    return f"no training images; expected {LAYOUT}"


def _check_labels(containers: tuple[Path, ...], entries: list[_Entry]) -> None:
    """Raise a DataError for an image without a class, or if classes are given in two ways."""
    numbered = next((entry for entry in entries if isinstance(entry.kind, int)), None)
    for entry in entries:
        if isinstance(entry.kind, int):
            continue
        if len(entry.below) == 1:
            problem = "is neither in the folder of a class nor has a .cls file"
        elif numbered is not None:
            other = printable(containers[numbered.container] / numbered.name)
            problem = (
                "some images are in the folder of a class, others have a .cls file, as this one "
                f"and {other}"
            )
        else:
            continue
        raise image_error(containers[entry.container] / entry.name, entry.offset, problem)


def _common_classes(
    root: Path, name: str, train: Iterable[_Entry], test: Iterable[_Entry]
) -> dict[str | int, int]:
    """Return labels by class, in the order of the names or numbers of the classes."""
    trained, tested = ({entry.kind for entry in part} for part in (train, test))
    if trained != tested:
        only = {"train": trained - tested, name: tested - trained}
        only_in = [f"only in {part}: {_some(kinds)}" for part, kinds in only.items() if kinds]
        raise DataError(
            f"{printable(root)}: train and {name} have different classes; {'; '.join(only_in)}"
        )
    if len(trained) == 1:
        raise DataError(
            f"{printable(root)}: only one class, {printable(next(iter(trained)))!r}. A network "
            "learns to tell classes apart: at least two folders are needed in train/ and val/."
        )
    spellings: dict[str, str | int] = {}
    for kind in trained:
        other = spellings.setdefault(unicodedata.normalize("NFC", str(kind)), kind)
        if other != kind:
            raise DataError(
                f"{printable(root)}: {other!a} and {kind!a} are two spellings of the same class in "
                "Unicode. Rename one of them."
            )
    return {kind: label for label, kind in enumerate(sorted(trained))}


def _some(kinds: set[str | int]) -> str:
    names = sorted(map(printable, kinds))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _to_files(
    containers: tuple[Path, ...], entries: list[_Entry], classes: dict[str | int, int]
) -> ImageFiles:
    entries.sort()
    return ImageFiles(
        containers,
        Names(os.fsencode(entry.name) for entry in entries),
        np.array([(entry.container, entry.offset, entry.size) for entry in entries]),
        np.array([classes[entry.kind] for entry in entries]),
        tuple(map(str, classes)),
    )


def _in_folder(root: Path, part: str) -> Iterator[tuple[str, _Entry]]:
    """Yield the images below a folder. Each folder is searched once, also if links point to it."""
    parents = Path(os.path.realpath(root / part)).parents
    above = {_identity(parent, os.stat(parent)) for parent in parents}
    visited: dict[Identity, tuple[str, ...]] = {}
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        inside = waiting.pop()
        folder = root.joinpath(part, *inside)
        files, folders, identity = _list_folder(folder)
        if identity in above:
            raise DataError(f"{printable(folder)}: is a folder that {part} is in. Remove the link.")
        before = visited.setdefault(identity, inside)
        if before is not inside:
            if before[:1] not in ((), inside[:1]):
                raise DataError(
                    f"{printable(folder)}: is also the folder {'/'.join(map(printable, before))}, "
                    "of another class. Remove one of the links."
                )
            continue  # found under its other path, in the same class
        waiting += [(*inside, name) for name in sorted(folders, reverse=True)]
        for name in files:
            below = (*inside, name)
            yield part, _Entry(below[0], below, 0, str(Path(part, *below)))


def _list_folder(folder: Path) -> tuple[list[str], list[str], Identity]:
    """Return images and folders in a folder that are not hidden, and what identifies the folder."""
    files, folders = [], []
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is(entry.is_dir):
                    folders.append(entry.name)
                elif is_image(entry.name) or is_other_image(entry.name):
                    if not _is(entry.is_file):
                        kind = "a broken link" if not os.path.exists(entry) else "no regular file"
                        raise DataError(f"{printable(folder / entry.name)}: is {kind}. Remove it.")
                    files.append(entry.name)
    except OSError as error:
        raise DataError(f"{printable(folder)}: cannot be read ({error.strerror})") from None
    return files, folders, _identity(folder, status)


def _is(kind: Callable[[], bool]) -> bool:
    """Call `is_dir` or `is_file` of an entry. A link that leads to itself is neither."""
    try:
        return kind()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _identity(folder: Path, status: os.stat_result) -> Identity:
    if status.st_ino == 0:  # the file system does not number its files
        return os.path.realpath(folder)
    return status.st_dev, status.st_ino


def _in_tar(file: Path, container: int, part: str | None = None) -> Iterator[tuple[str, _Entry]]:
    """Yield images of a tar file with their part: `part`, or the first folder that names one.

    The part of others is empty.
    """
    index = tar_index(file)
    names = Names.from_arrays(index["text"], index["ends"])
    members = zip(names, index["spans"].tolist(), index["classes"].tolist(), strict=True)
    for raw, (offset, size), number in members:
        name = os.fsdecode(raw)
        path = steps(name)
        found = part or next((step for step in path[:-1] if step in PARTS), None)
        if found is None:
            yield "", _Entry("", path, container, name, offset, size)
            continue
        below = path[path.index(found) + 1 :] if found in path[:-1] else path
        kind = below[0] if number < 0 else number
        yield found, _Entry(kind, below, container, name, offset, size)
