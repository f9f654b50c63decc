"""Encoded images on disk: files in a folder, or byte ranges of tar files."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .cache import version

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFiles:
    """The locations of N images. Tar files are read in place, in any order.

    Attributes:
        containers: one folder, or tar files.
        names: path within the container, bytes (N,).
        spans: index of the container, then offset and size in a tar file, int64 (N, 3).
        labels: int64 (N,).

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
    names: np.ndarray
    spans: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> ImageFiles:
        """Return the images at `index`, in that order."""
        return replace(
            self, names=self.names[index], spans=self.spans[index], labels=self.labels[index]
        )

    def path(self, i: int) -> Path:
        """Return the path of an image, for messages; a tar file counts as a folder."""
        return self.containers[self.spans[i, 0]] / os.fsdecode(self.names[i])

    def read(self, i: int) -> bytes:
        """Return the encoded bytes of an image."""
        container, offset, size = self.spans[i].tolist()
        if self.containers[container].is_dir():
            return self.path(i).read_bytes()
        # Opened for each image: there can be more shards than a process may keep open.
        descriptor = os.open(self.containers[container], os.O_RDONLY)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def decode(self, i: int) -> Tensor:
        """Return the pixels of an image, uint8 (H, W, 3).

        Raises:
            DataError: the image cannot be decoded; the message names it.
        """
        try:
            from PIL import Image
        except ImportError:
            raise DataError(
                "images require Pillow. Run pip install 'torch-feather[train]'."
            ) from None
        try:
            with Image.open(io.BytesIO(self.read(i))) as image:
                return torch.from_numpy(np.array(image.convert("RGB")))
        except Exception as error:  # a damaged file may raise anything
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{self.path(i)}: cannot be decoded as an image ({first})") from None

    def version(self) -> str:
        """Return a hash that changes if an image is changed, added or removed."""
        digest = hashlib.sha256(self.names.tobytes() + self.spans.tobytes())
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
