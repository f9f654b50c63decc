"""Finding images and their classes in folders and tar files.

Paths read `train/CLASS/IMAGE` and `val/CLASS/IMAGE`, in a folder or in one tar file; or there are
tar files train*.tar and val*.tar with `CLASS/IMAGE` or with pairs `KEY.jpg`, `KEY.cls` (the
class's number). For `val`, `validation` and `test` do as well.
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

HELD_BACK = ("val", "validation", "test")  # what the part for evaluation may be called
PARTS = ("train", *HELD_BACK)
LAYOUT = (
    "a folder with train/ and val/, each with a folder of images per class; a tar file of that; "
    "or a folder with train*.tar and val*.tar"
)


class Entry(NamedTuple):
    """One image, ordered by class and path so that folders and tar files give the same order."""

    kind: str | int  # its class, by name (the first step of `below`) or number
    below: tuple[str, ...]  # path within the part
    container: int
    name: str
    offset: int = 0
    size: int = 0


def find_images(path: str | None) -> tuple[ImageFiles, ImageFiles, int]:
    """The images to train on, those to evaluate on, and the number of classes.

    Raises:
        DataError: a layout that is not one of the above; parts whose classes differ.
    """
    if path is None:
        raise DataError(f"imagefolder needs --data-path: {LAYOUT}")
    root = Path(path).expanduser()
    containers: tuple[Path, ...] = (root,)
    if root.is_file():
        found = _in_tar(root, 0)
    elif not root.is_dir():
        raise DataError(f"{root}: no such file or folder; --data-path names {LAYOUT}")
    elif (root / "train").is_dir():
        found = (pair for part in PARTS for pair in _in_folder(root, part))
    else:
        shards = [(file, part) for part in PARTS for file in sorted(root.glob(f"{part}*.tar"))]
        containers = tuple(file for file, _ in shards)
        found = (pair for i, (file, part) in enumerate(shards) for pair in _in_tar(file, i, part))
    parts: dict[str, list[Entry]] = {}
    for part, entry in found:
        parts.setdefault(part, []).append(entry)
    if "train" not in parts:
        raise DataError(f"{root}: no images to train on; expected {LAYOUT}")
    held_back = next((part for part in HELD_BACK if part in parts), None)
    if held_back is None:
        raise DataError(f"{root}: no images in {', '.join(HELD_BACK[:-1])} or {HELD_BACK[-1]}")
    for entry in parts["train"] + parts[held_back]:
        if len(entry.below) == 1 and entry.kind == entry.below[0]:
            stray = containers[entry.container] / entry.name
            raise DataError(f"{stray}: neither in a class's folder nor in a tar file with its .cls")
    classes = _common_classes(root, held_back, parts["train"], parts[held_back])
    train, test = (_to_files(containers, parts[part], classes) for part in ("train", held_back))
    return train, test, len(classes)


def _common_classes(
    root: Path, name: str, train: Iterable[Entry], test: Iterable[Entry]
) -> dict[str | int, int]:
    """Class to label, in the order of names (of numbers, where classes are numbered)."""
    ours, theirs = ({entry.kind for entry in part} for part in (train, test))
    if ours != theirs:
        only = {"train": ours - theirs, name: theirs - ours}
        told = [f"only in {part}: {_some(kinds)}" for part, kinds in only.items() if kinds]
        raise DataError(f"{root}: train and {name} have different classes; {'; '.join(told)}")
    if len({type(kind) for kind in ours}) > 1:
        raise DataError(f"{root}: some images are in a class's folder, others have a .cls")
    return {kind: label for label, kind in enumerate(sorted(ours))}


def _some(kinds: set[str | int]) -> str:
    names = sorted(map(str, kinds))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _to_files(
    containers: tuple[Path, ...], entries: list[Entry], classes: dict[str | int, int]
) -> ImageFiles:
    entries.sort()
    return ImageFiles(
        containers,
        np.array([os.fsencode(entry.name) for entry in entries]),
        np.array([(entry.container, entry.offset, entry.size) for entry in entries]),
        np.array([classes[entry.kind] for entry in entries]),
    )


def _is_image(*path: str) -> bool:
    """By its name; what is hidden, or in a hidden folder, does not count."""
    return path[-1].lower().endswith(SUFFIXES) and not any(s.startswith(".") for s in path)


def _in_folder(root: Path, part: str) -> Iterator[tuple[str, Entry]]:
    for folder, folders, names in os.walk(root / part, followlinks=True):
        folders[:] = [step for step in folders if not step.startswith(".")]
        inside = Path(folder).relative_to(root / part).parts
        for name in filter(_is_image, names):
            below = (*inside, name)
            yield part, Entry(below[0], below, 0, str(Path(part, *below)))


def _in_tar(file: Path, container: int, part: str | None = None) -> Iterator[tuple[str, Entry]]:
    """Images of a tar file with their parts: `part`, or the first folder named like one."""
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
        yield found, Entry(kind, below, container, name, offset, size)


def _index(file: Path) -> dict[str, Any]:
    """Names and places of the images in a tar file; classes by .cls files, elsewhere -1."""
    names: list[str] = []
    spans: list[tuple[int, int]] = []
    numbers: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all it has seen
                stem, suffix = os.path.splitext(member.name)
                if not member.isfile():
                    continue
                if _is_image(*_steps(member.name)):
                    names.append(member.name)
                    spans.append((member.offset_data, member.size))
                elif suffix == ".cls" and (content := tar.extractfile(member)):
                    numbers[stem] = _number(file / member.name, content.read())
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{file}: not a whole, uncompressed tar file ({error})") from None
    return {
        "names": np.array([os.fsencode(name) for name in names]),
        "spans": np.array(spans, dtype=np.int64).reshape(-1, 2),
        "classes": np.array([numbers.get(os.path.splitext(n)[0], -1) for n in names], np.int64),
    }


def _steps(name: str) -> tuple[str, ...]:
    return tuple(step for step in name.split("/") if step != ".")


def _number(path: Path, content: bytes) -> int:
    if not content.strip().isdigit():
        raise DataError(f"{path}: must hold the number of a class, holds {content[:20]!r}")
    return int(content)
