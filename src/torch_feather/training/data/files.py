"""Encoded images on disk: files in a folder, or byte ranges of tar files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, printable
from .cache import version
from .images import decode_image
from .names import Names
from .regular import LARGEST, open_regular, read_regular

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def image_error(path: Path, offset: int, problem: str) -> DataError:
    """Return an error of an image.

    Args:
        path: its path; a tar file counts as a folder.
        offset: offset of its bytes in a tar file; 0 in a folder.
        problem: what is wrong.

    Example:
        >>> print(image_error(Path("a.tar/b.png"), 512, "is too large"))
        a.tar/b.png: is too large (at byte 512 of the tar file)
    """
    where = f" (at byte {offset} of the tar file)" if offset else ""
    return DataError(f"{printable(path)}: {problem}{where}")


@dataclass(frozen=True)
class ImageFiles:
    """The locations of N images. Tar files are read in place, in any order.

    Attributes:
        containers: one folder, or tar files.
        names: path within the container, N names.
        spans: index of the container, then offset and size in a tar file, int64 (N, 3).
        labels: int64 (N,).
        classes: names of the classes, in the order of their labels.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (3, 2), color=(255, 0, 0)).save(folder / "red.png")
        >>> names, spans = np.array([b"red.png"]), np.zeros((1, 3), int)
        >>> files = ImageFiles((folder,), names, spans, np.array([7]))
        >>> files.path(0).name, files.decode(0).shape
        ('red.png', torch.Size([2, 3, 3]))
    """

    containers: tuple[Path, ...]
    names: Names
    spans: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Number of channels of the decoded images."""
        return 3

    def take(self, index: np.ndarray) -> ImageFiles:
        """Return the images at `index`, in that order."""
        return replace(
            self,
            names=self.names.take(index),
            spans=self.spans[index],
            labels=self.labels[index],
        )

    def path(self, i: int) -> Path:
        """Return the path of an image; a tar file counts as a folder."""
        return self.containers[self.spans[i, 0]] / os.fsdecode(self.names[i])

    def error(self, i: int, problem: str) -> DataError:
        """Return an error of an image, with its path and, in a tar file, its offset."""
        return image_error(self.path(i), int(self.spans[i, 1]), problem)

    def read(self, i: int) -> bytes:
        """Return the encoded bytes of an image.

        Raises:
            DataError: the file cannot be read, is no regular file, or is too large.
        """
        container, offset, size = self.spans[i].tolist()
        try:
            if not offset:  # no tar file has a member at its first byte
                return read_regular(self.path(i))
            if size > LARGEST:
                raise self.error(i, f"has {size:,} bytes, but at most {LARGEST:,} are read")
            # Opened for each image: there can be more shards than a process may keep open.
            descriptor, _ = open_regular(self.containers[container])
        except OSError as error:
            raise self.error(i, f"cannot be decoded as an image ({error.strerror})") from None
        try:
            content = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if len(content) < size:
            raise self.error(i, "cannot be decoded as an image (the tar file was truncated)")
        return content

    def decode(self, i: int) -> Tensor:
        """Return the pixels of an image, uint8 (H, W, 3).

        Raises:
            DataError: the image cannot be decoded; the message names it.
        """
        try:
            return torch.from_numpy(decode_image(self.read(i)))
        except ValueError as error:
            raise self.error(i, f"cannot be decoded as an image ({error})") from None

    def prepare(self, i: int, prepare: Callable[[Tensor, int], Tensor], seed: int = 0) -> Tensor:
        """Return the decoded image `i` after `prepare`.

        Raises:
            DataError: the image cannot be decoded or prepared; the message names it.
        """
        pixels = self.decode(i)
        try:
            return prepare(pixels, seed)
        except DataError as error:
            raise self.error(i, str(error)) from None

    def sizes(self) -> np.ndarray:
        """Return the number of bytes of each encoded image, int64 (N,).

        Raises:
            DataError: a file does not exist any more.
        """
        in_tar = self.spans[:, 1] > 0
        sizes = self.spans[:, 2].copy()
        for i in np.flatnonzero(~in_tar).tolist():
            try:
                sizes[i] = self.path(i).stat().st_size
            except OSError as error:
                raise self.error(i, f"cannot be read ({error.strerror})") from None
        return sizes

    def version(self) -> str:
        """Return a hash that changes if an image is changed, added or removed."""
        digest = hashlib.sha256()
        for array in (self.names.text, self.names.ends, self.spans):
            digest.update(array.tobytes())
        if self.containers[0].is_dir():
            stats = (self.path(i).stat() for i in range(len(self)))
            found = [
                str(self.containers[0].resolve()),
                *((s.st_size, s.st_mtime_ns) for s in stats),
            ]
            digest.update(repr(found).encode())
        else:
            digest.update(repr([version(file) for file in self.containers]).encode())
        return digest.hexdigest()
