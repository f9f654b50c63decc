"""Tar files: the index, and every image in it."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from torch_feather.training.data.find import find_images
from torch_feather.training.errors import DataError

from ..mutate import mutate_blocks, mutate_bytes
from .base import Target, refused

BLOCK = 512
NUMBERS = (b"0", b"1", b"7777777", b"0" * 11, b"7" * 11, b"-1", b" 1 ", b"\x80" + b"\xff" * 11)
NAMES = (
    *(b"a.png", b"a.cls", b"./a.png", b"a//b.png", b"../a.png", b"/a.png", b".a.png", b"a/", b"a"),
    *(b"train/a/b.png", b"\xff.png", b"\n.png", b"\x1b[2J.png", b"PaxHeader/a.png", b"a.png\0x"),
)
KINDS = b"0\x0001234567xgLKSVDMN9A"


class Archives(Target):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cache = folder / "cache"
        os.environ["TORCH_FEATHER_CACHE"] = str(self.cache)
        self.root = folder / "shards"
        self.root.mkdir(exist_ok=True)
        numbers = [(f"{i}.png", _png(i)) for i in range(2)]
        numbers += [(f"{i}.cls", str(i).encode()) for i in range(2)]
        (self.root / "val-0.tar").write_bytes(_tar(numbers, tarfile.USTAR_FORMAT))
        self.file = self.root / "train-0.tar"
        self.time = 10**18

    def seeds(self) -> list[bytes]:
        labeled = [(f"{i}.{s}", c) for i in range(3) for s, c in _pair(i)]
        long = [("x" * 120 + "/" + name, content) for name, content in labeled]
        odd = [("é" + name, content) for name, content in labeled]
        formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        found = [_tar(members, f) for members in (labeled, long, odd) for f in formats]
        folders = [(f"train/{i}/./{i}.{s}", c) for i in range(3) for s, c in _pair(i)]
        return [*found, _tar(folders, tarfile.PAX_FORMAT)]

    def mutate(self, rng: Random, content: bytes, others: Sequence[bytes]) -> bytes:
        kind = rng.random()
        if kind < 0.2:
            return mutate_bytes(rng, content, others)
        if kind < 0.4:
            return mutate_blocks(rng, content, BLOCK, others)
        data = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 3))):
            _change_header(rng, data)
        return bytes(data)

    def check(self, content: bytes) -> bool:
        self.file.write_bytes(content)
        self.time += 1  # otherwise the index of an input within the same tick would be used
        os.utime(self.file, ns=(self.time, self.time))
        found = []
        try:
            if refused(lambda: found.append(find_images(str(self.root))[0]), DataError):
                return False
            (files,) = found
            for i in range(len(files)):
                refused(lambda i=i: files.decode(i), DataError)
            self._compare(files)
        finally:
            for file in self.cache.glob("*"):
                file.unlink()
        return True

    def _has_prefix(self, member: tarfile.TarInfo) -> bool:
        """Return whether the header of a member is of a format with a prefix of the name."""
        start = member.offset_data - BLOCK + 257
        return self.file.read_bytes()[start : start + 5] == b"ustar"

    def _compare(self, files) -> None:
        """What Python's reader finds is found, and has the same content."""
        try:
            with tarfile.open(self.file, "r:") as tar:
                members = [m for m in tar if m.isreg() and m.name.endswith(".png")]
                # It reads a prefix of the name also where a header of that format has none.
                members = [m for m in members if self._has_prefix(m)]
                expected = {os.fsencode(m.name): tar.extractfile(m).read() for m in members}
        except Exception:  # it may not read what this reader reads
            return
        names = {os.fsdecode(name) for name in files.names}
        known = {"/".join(s for s in n.split("/") if s not in ("", ".")) for n in names}
        for i, name in enumerate(files.names):
            if bytes(name) in expected:
                assert files.read(i) == expected[bytes(name)], name
        for name in expected:
            path = [s for s in os.fsdecode(name).split("/") if s not in ("", ".")]
            hidden = any(s.startswith(".") for s in path)
            assert hidden or "/".join(path) in known, name


def _png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _pair(i: int) -> list[tuple[str, bytes]]:
    return [("png", _png(i)), ("cls", str(i % 2).encode())]


def _tar(members: list[tuple[str, bytes]], format: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    whole = stream.getvalue().rstrip(b"\0")
    return whole + bytes(-len(whole) % BLOCK + 2 * BLOCK)


def _change_header(rng: Random, data: bytearray) -> None:
    """Change a field of a header, and set its checksum."""
    headers = [
        i for i in range(0, len(data) - BLOCK + 1, BLOCK) if data[i + 257 : i + 262] == b"ustar"
    ]
    if not headers:
        return
    at = rng.choice(headers)
    header = data[at : at + BLOCK]
    match rng.randrange(7):
        case 0 | 1:
            _set(header, 124, 12, rng.choice((*NUMBERS, b"%o" % rng.randrange(5000))))
        case 2:
            header[156] = rng.choice(KINDS)
        case 3:
            _set(header, 0, 100, rng.choice(NAMES))
        case 4:
            _set(header, 157, 100, rng.choice(NAMES))
        case 5:
            header = bytearray(mutate_bytes(rng, bytes(header))[:BLOCK].ljust(BLOCK, b"\0"))
        case 6:  # an extended header before this one
            records = rng.choice(
                (b"path=a.png\n", b"size=3\n", b"size=" + b"9" * 30 + b"\n", b"GNU.sparse.size=9\n")
            )
            content = b"%d " % (len(records) + 3 + (len(records) > 96)) + records
            block = content.ljust(-(-len(content) // BLOCK) * BLOCK, b"\0")
            extra = bytearray(header)
            extra[156] = ord("x")
            _set(extra, 124, 12, b"%011o" % len(content))
            _sign(extra)
            data[at:at] = extra + block
            return
    _sign(header)
    data[at : at + BLOCK] = header


def _set(header: bytearray, at: int, size: int, value: bytes) -> None:
    header[at : at + size] = value[:size].ljust(size, b"\0")


def _sign(header: bytearray) -> None:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
