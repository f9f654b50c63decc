"""Find images and their classes in folders and tar files.

A folder or tar file has the paths `train/CLASS/IMAGE` and `val/CLASS/IMAGE`. Alternatively, a
folder has the tar files train*.tar and val*.tar with paths `CLASS/IMAGE`, or with pairs `KEY.jpg`
and `KEY.cls` (the number of the class). `validation` and `test` are accepted in place of `val`.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from .cache import cached, version
from .files import SUFFIXES, ImageFiles

HELD_BACK = ("val", "validation", "test")  # accepted names of the evaluation images
PARTS = ("train", *HELD_BACK)
LAYOUT = (
    "a folder with train/ and val/, each with a folder of images per class; a tar file of such a "
    "folder; or a folder with train*.tar and val*.tar"
)


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
    if root.is_file():
        found = _in_tar(root, 0)
    elif not root.is_dir():
        raise DataError(f"{root}: no such file or folder. Set --data-path to {LAYOUT}.")
    elif (root / "train").is_dir():
        found = (pair for part in PARTS for pair in _in_folder(root, part))
    else:
        shards = [(file, part) for part in PARTS for file in sorted(root.glob(f"{part}*.tar"))]
        containers = tuple(file for file, _ in shards)
        found = (pair for i, (file, part) in enumerate(shards) for pair in _in_tar(file, i, part))
    parts: dict[str, list[_Entry]] = {}
    for part, entry in found:
        parts.setdefault(part, []).append(entry)
    if "train" not in parts:
        raise DataError(f"{root}: no training images; expected {LAYOUT}")
    held_back = next((part for part in HELD_BACK if part in parts), None)
    if held_back is None:
        raise DataError(f"{root}: no images in {', '.join(HELD_BACK[:-1])} or {HELD_BACK[-1]}")
    for entry in parts["train"] + parts[held_back]:
        if len(entry.below) == 1 and entry.kind == entry.below[0]:
            stray = containers[entry.container] / entry.name
            raise DataError(f"{stray}: is neither in the folder of a class nor has a .cls file")
    classes = _common_classes(root, held_back, parts["train"], parts[held_back])
    train, test = (_to_files(containers, parts[part], classes) for part in ("train", held_back))
    return train, test, len(classes)


def _common_classes(
    root: Path, name: str, train: Iterable[_Entry], test: Iterable[_Entry]
) -> dict[str | int, int]:
    """Return labels by class, in the order of the names or numbers of the classes."""
    trained, tested = ({entry.kind for entry in part} for part in (train, test))
    if trained != tested:
        only = {"train": trained - tested, name: tested - trained}
        only_in = [f"only in {part}: {_some(kinds)}" for part, kinds in only.items() if kinds]
        raise DataError(f"{root}: train and {name} have different classes; {'; '.join(only_in)}")
    if len({type(kind) for kind in trained}) > 1:
        raise DataError(
            f"{root}: some images are in the folder of a class, others have a .cls file"
        )
    return {kind: label for label, kind in enumerate(sorted(trained))}


def _some(kinds: set[str | int]) -> str:
    names = sorted(map(str, kinds))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _to_files(
    containers: tuple[Path, ...], entries: list[_Entry], classes: dict[str | int, int]
) -> ImageFiles:
    entries.sort()
    return ImageFiles(
        containers,
        np.array([os.fsencode(entry.name) for entry in entries]),
        np.array([(entry.container, entry.offset, entry.size) for entry in entries]),
        np.array([classes[entry.kind] for entry in entries]),
    )


def _is_image(*path: str) -> bool:
    """Whether the name is that of an image that is neither hidden nor in a hidden folder."""
    return path[-1].lower().endswith(SUFFIXES) and not any(s.startswith(".") for s in path)


def _in_folder(root: Path, part: str) -> Iterator[tuple[str, _Entry]]:
    for folder, folders, names in os.walk(root / part, followlinks=True):
        folders[:] = [step for step in folders if not step.startswith(".")]
        inside = Path(folder).relative_to(root / part).parts
        for name in filter(_is_image, names):
            below = (*inside, name)
            yield part, _Entry(below[0], below, 0, str(Path(part, *below)))


def _in_tar(file: Path, container: int, part: str | None = None) -> Iterator[tuple[str, _Entry]]:
    """Yield images of a tar file with their part: `part`, or the first folder that names one."""
    index = cached("tar-index", [version(file)], lambda: _index(file))
    members = zip(index["names"], index["spans"].tolist(), index["classes"].tolist(), strict=True)
    for raw, (offset, size), number in members:
        name = os.fsdecode(raw)
        path = _steps(name)
        found = part or next((step for step in path[:-1] if step in PARTS), None)
        if found is None:
            continue
        below = path[path.index(found) + 1 :] if found in path[:-1] else path
        kind = below[0] if number < 0 else number
        yield found, _Entry(kind, below, container, name, offset, size)


def _index(file: Path) -> dict[str, Any]:
    """Return names and byte ranges of the images in a tar file; classes by .cls files, or -1."""
    names: list[str] = []
    spans: list[tuple[int, int]] = []
    numbers: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps every member
                stem, suffix = os.path.splitext(member.name)
                if not member.isfile():
                    continue
                if _is_image(*_steps(member.name)):
                    names.append(member.name)
                    spans.append((member.offset_data, member.size))
                elif suffix == ".cls" and (content := tar.extractfile(member)):
                    numbers[stem] = _number(file / member.name, content.read())
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{file}: not a complete, uncompressed tar file ({error})") from None
    return {
        "names": np.array([os.fsencode(name) for name in names]),
        "spans": np.array(spans, dtype=np.int64).reshape(-1, 2),
        "classes": np.array([numbers.get(os.path.splitext(n)[0], -1) for n in names], np.int64),
    }


def _steps(name: str) -> tuple[str, ...]:
    return tuple(step for step in name.split("/") if step != ".")


def _number(path: Path, content: bytes) -> int:
    if not content.strip().isdigit():
        raise DataError(f"{path}: must contain the number of a class, got {content[:20]!r}")
    return int(content)
