"""Encoded images on disk: files of a folder, or byte ranges of tar files."""

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
    """Where N images lie; tar files are read in place, at any order."""

    containers: tuple[Path, ...]  # one folder, or tar files
    names: np.ndarray  # bytes (N,): path in the container
    spans: np.ndarray  # int64 (N, 3): number of the container, offset and size in a tar file
    labels: np.ndarray  # int64 (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray) -> ImageFiles:
        """The images at `index`, in that order."""
        return replace(
            self, names=self.names[index], spans=self.spans[index], labels=self.labels[index]
        )

    def path(self, i: int) -> Path:
        """Of an image, for messages; in a tar file, as if that were a folder."""
        return self.containers[self.spans[i, 0]] / os.fsdecode(self.names[i])

    def read(self, i: int) -> bytes:
        """An image as it is stored."""
        container, offset, size = self.spans[i].tolist()
        if self.containers[container].is_dir():
            return self.path(i).read_bytes()
        # Opened for each image: shards can be more than a process may hold open.
        descriptor = os.open(self.containers[container], os.O_RDONLY)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def decode(self, i: int) -> Tensor:
        """uint8 (H, W, 3). Raises `DataError` that names the image."""
        try:
            from PIL import Image
        except ImportError:
            raise DataError("images need Pillow: pip install 'torch-feather[train]'") from None
        try:
            with Image.open(io.BytesIO(self.read(i))) as image:
                return torch.from_numpy(np.array(image.convert("RGB")))
        except Exception as error:  # a damaged file may raise anything
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{self.path(i)}: cannot be decoded as an image ({first})") from None

    def version(self) -> str:
        """What changes when an image does, or which ones there are."""
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
