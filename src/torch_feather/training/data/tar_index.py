"""The index of a tar file: where its images are, and the numbers of their classes."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, printable
from .archive import LINK, OTHER, REGULAR, SYMBOLIC, Member, read_members, shown
from .cache import cached, version
from .files import SUFFIXES
from .names import Names

LABEL = ".cls"
LONGEST_LABEL = 32  # bytes of a .cls file
LARGEST_LABEL = 2**63 - 1
# Images that are not read; they are counted, so that a warning can name them.
OTHER_SUFFIXES = (
    ".gif",
    ".jfif",
    ".jpe",
    ".jp2",
    ".j2k",
    ".avif",
    ".heic",
    ".heif",
    ".tga",
    ".exr",
)


def tar_index(file: Path) -> Mapping[str, Any]:
    """Return the images of a tar file, from the cache if it was indexed before.

    Args:
        file: the tar file.

    Returns:
        `text` and `ends` of the `Names` of the images and of files with `OTHER_SUFFIXES`, in
        order; `spans`: offset and size of each, int64 (N, 2); `classes`: the number of the class
        of each from its .cls file, or -1, int64 (N,).

    Raises:
        DataError: the file is damaged or incomplete; two members have the same path or label; or
            a .cls file has no image or no number.

    Example:
        >>> tar_index(Path("train.tar"))
        Traceback (most recent call last):
        ...
        torch_feather.training.errors.DataError: train.tar: no such file
    """
    if not file.exists():
        raise DataError(f"{printable(file)}: no such file")
    return cached("tar-index", [2, version(file)], lambda: _Index(file).arrays())


def steps(name: str) -> tuple[str, ...]:
    """Return the folders and the file of a path, alike for all its spellings.

    Example:
        >>> steps("./a//b.png")
        ('a', 'b.png')
    """
    return tuple(step for step in name.split("/") if step not in ("", "."))


def is_image(*path: str) -> bool:
    """Return whether the name is that of an image that is neither hidden nor in a hidden folder.

    Args:
        path: the folders and the file, as of `steps`.

    Example:
        >>> is_image("cats", "a.PNG"), is_image(".cache", "a.png"), is_image("cats", "a.gif")
        (True, False, False)
    """
    return _has(SUFFIXES, *path)


def is_other_image(*path: str) -> bool:
    """Return whether the name is that of an image in a format that is not read.

    Args:
        path: the folders and the file, as of `steps`.

    Example:
        >>> is_other_image("cats", "a.gif"), is_other_image("cats", "a.png")
        (True, False)
    """
    return _has(OTHER_SUFFIXES, *path)


def _has(suffixes: tuple[str, ...], *path: str) -> bool:
    return bool(path) and path[-1].lower().endswith(suffixes) and not _is_hidden(*path)


def _is_hidden(*path: str) -> bool:
    return any(step.startswith(".") and step != ".." for step in path)


class _Index:
    """Collects the members of a tar file, and checks that they belong together."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.images: list[Member] = []
        self.stems: dict[str, Member] = {}  # the images by their path without suffix
        self.labels: dict[str, tuple[int, Member]] = {}
        self.seen: dict[str, Member] = {}  # images and labels by normalized path
        self.links: list[tuple[str, Member]] = []  # folders that symbolic links may point to
        self.twice: dict[str, Member] = {}  # images that share a path without suffix
        for member in read_members(file):
            self._add(member)
        self._check()

    def _add(self, member: Member) -> None:
        path = steps(os.fsdecode(member.name))
        name = "/".join(path)
        stem, suffix = posixpath.splitext(name)
        label = suffix == LABEL and not _is_hidden(*path)
        if not (label or is_image(*path) or is_other_image(*path)):
            if member.kind == SYMBOLIC:
                target = posixpath.join(posixpath.dirname(name), os.fsdecode(member.target))
                self.links.append((posixpath.normpath(target), member))
            return
        if member.kind == OTHER and member.name.endswith(b"/"):
            return  # a folder
        if member.kind != REGULAR:
            repack = ". Pack the files again with --dereference --hard-dereference"
            self._fail(
                member, f"is {member.kind}{repack if member.kind in (LINK, SYMBOLIC) else ''}"
            )
        if ".." in path:
            self._fail(member, "has a path with '..'")
        if (first := self.seen.setdefault(name, member)) is not member:
            self._fail(member, f"is the path of the member at byte {first.header} too")
        if label:
            self.labels[stem] = (self._number(member), member)
        else:
            self.images.append(member)
            if self.stems.setdefault(stem, member) is not member:
                self.twice[stem] = member

    def _check(self) -> None:
        for stem, (_, member) in self.labels.items():
            if stem not in self.stems:
                self._fail(member, "is the class of an image that is missing")
            if stem in self.twice:
                self._fail(self.twice[stem], f"is the second image of {shown(member.name)}")
        if self.links:
            folders = {os.fsdecode(m.name).rpartition("/")[0] for m in self.images}
            known = {"/".join(steps(f)[:i]) for f in folders for i in range(f.count("/") + 2)}
            for target, member in self.links:
                if target in known:
                    self._fail(member, "is a link to a folder with images. Pack with --dereference")

    def _number(self, member: Member) -> int:
        content = b""
        if member.size <= LONGEST_LABEL:
            with open(self.file, "rb") as file:
                content = os.pread(file.fileno(), member.size, member.start)
        if not content.strip().isdigit() or int(content) > LARGEST_LABEL:
            found = repr(content[:20]) if content else f"{member.size:,} bytes"
            self._fail(member, f"must contain the number of a class, got {found}")
        return int(content)

    def _fail(self, member: Member, problem: str) -> None:
        path = f"{printable(self.file)}/{shown(member.name)}"
        raise DataError(f"{path}: {problem} (header at byte {member.header})")

    def arrays(self) -> dict[str, Any]:
        """Return the arrays to cache."""
        names = Names(member.name for member in self.images)
        stems = (posixpath.splitext("/".join(steps(os.fsdecode(n))))[0] for n in names)
        classes = [self.labels[stem][0] if stem in self.labels else -1 for stem in stems]
        spans = [(member.start, member.size) for member in self.images]
        return {
            "text": names.text,
            "ends": names.ends,
            "spans": np.array(spans, dtype=np.int64).reshape(-1, 2),
            "classes": np.array(classes, dtype=np.int64),
        }
