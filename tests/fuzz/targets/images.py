"""Encoded images, decoded and prepared as for training and evaluation."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from torch_feather.training.config import DataConfig
from torch_feather.training.data import images
from torch_feather.training.data.files import ImageFiles
from torch_feather.training.data.names import Names
from torch_feather.training.data.prepare import Augment, Center
from torch_feather.training.errors import DataError

from ..mutate import mutate_bytes
from .base import Target, refused

MOST_PIXELS = 2**20  # lowered, so that a valid image stays within the bounds of one input
_PNG = b"\x89PNG\r\n\x1a\n"
PLAIN = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
}


class Images(Target):
    traced = ("torch_feather", "PIL")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        images.MAX_PIXELS = MOST_PIXELS
        spans, labels = np.zeros((1, 3), np.int64), np.zeros(1, np.int64)
        self.files = ImageFiles((folder,), Names([b"image"]), spans, labels)
        self.prepare = (Augment(DataConfig(crop="resized"), 8), Center(9, 8))

    def seeds(self) -> list[bytes]:
        rng = np.random.default_rng(0)
        found = []
        for kind, modes in PLAIN.items():
            for mode in modes:
                found += _encoded(rng, kind, mode)
        return found

    def mutate(self, rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
        changed = mutate_bytes(rng, content, others)
        if changed.startswith(_PNG) and rng.random() < 0.8:
            return _sign_png(changed)
        return changed

    def check(self, content: bytes) -> bool:
        (self.folder / "image").write_bytes(content)
        accepted = not refused(self._decode, DataError)
        for prepare in self.prepare:
            refused(lambda prepare=prepare: self.files.prepare(0, prepare, seed=3), DataError)
        return accepted

    def _decode(self) -> None:
        pixels = self.files.decode(0)
        assert pixels.shape[2:] == (3,)
        assert 0 < pixels.numel() <= 3 * MOST_PIXELS


def _encoded(rng: np.random.Generator, kind: str, mode: str) -> list[bytes]:
    """Return an image in a format and mode, with the variants of the format."""
    rgb = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    if mode.startswith("I;16"):
        image = Image.fromarray(rng.integers(0, 2**16, (5, 7)).astype(np.uint16))
    else:
        image = rgb.convert("RGBA").convert(mode) if mode != "LAB" else Image.new("LAB", (7, 5))
    options: list[dict] = [{}]
    if kind == "TIFF":
        options = [{}, {"compression": "tiff_lzw"}, {"compression": "packbits"}]
        options += [{"compression": "tiff_adobe_deflate"}]
    if kind == "PNG" and mode in ("L", "P"):
        options = [{}, {"transparency": 3}]
    if kind == "JPEG":
        exif = Image.Exif()
        exif[0x0112] = 6
        options = [{}, {"exif": exif}, {"progressive": True}]
    if kind == "WEBP":
        options = [{}, {"lossless": True}]
    if kind == "GIF":
        options = [{}, {"save_all": True, "append_images": [image.copy()]}]
    found = []
    for given in options:
        stream = io.BytesIO()
        try:
            image.save(stream, kind, **given)
        except (OSError, ValueError, KeyError):  # the format has no such mode or compression
            continue
        found.append(stream.getvalue())
    return found


def _sign_png(content: bytes) -> bytes:
    """Set the checksums of the chunks of a PNG file."""
    data, position = bytearray(content), len(_PNG)
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            break
        data[end - 4 : end] = zlib.crc32(data[position + 4 : end - 4]).to_bytes(4, "big")
        position = end
    return bytes(data)
