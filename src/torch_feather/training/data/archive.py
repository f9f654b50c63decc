"""A strict reader of tar files: it finds every member, or an error names the byte and the member.

Python's `tarfile` stops without an error at a damaged header that is not the first, and holds
whatever a header claims in memory. This reader supports the formats v7, ustar, pax and GNU without
sparse members, volumes of a larger archive, and compression.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..errors import DataError, printable
from .regular import open_regular

BLOCK = 512
LONGEST_NAME = 4096  # bytes, the limit of Linux
LARGEST_HEADER = 2**20  # bytes of an extended header
REGULAR, LINK, SYMBOLIC, OTHER = "a file", "a hard link", "a symbolic link", "no regular file"
RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")
# Devices, folders and FIFOs; volume labels of GNU.
_KINDS = {
    **dict.fromkeys((b"0", b"\0", b"7"), REGULAR),
    b"1": LINK,
    b"2": SYMBOLIC,
    **dict.fromkeys((b"3", b"4", b"5", b"6", b"V"), OTHER),
}


class Member(NamedTuple):
    """One member of a tar file.

    Attributes:
        name: its path, as stored.
        kind: REGULAR, LINK, SYMBOLIC or OTHER.
        target: what a link points to.
        header: offset of its header.
        start: offset of its content.
        size: bytes of its content.

    Example:
        >>> member = Member(b"a.png", REGULAR, target=b"", header=0, start=512, size=70)
        >>> member.start + member.size  # where its content ends
        582
    """

    name: bytes
    kind: str
    target: bytes
    header: int
    start: int
    size: int


def read_members(path: Path) -> Iterator[Member]:
    """Yield the members of an uncompressed tar file in order.

    Args:
        path: the tar file.

    Raises:
        DataError: the file cannot be read to its end mark, or has something behind it.

    Example:
        >>> import tarfile, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "images.tar")
        ...     with tarfile.open(file, "w") as archive:
        ...         archive.addfile(tarfile.TarInfo("a.png"))
        ...     [(member.name, member.kind, member.size) for member in read_members(file)]
        [(b'a.png', 'a file', 0)]
    """
    try:
        descriptor, size = open_regular(path)
        try:
            yield from _Reader(path, descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read ({error.strerror})") from None


class _Reader:
    """Iterates over the members of an open tar file."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path, self.descriptor, self.size = path, descriptor, size
        self.offset = 0  # of the next header
        self.previous = ""  # name of the last member, for messages

    def __iter__(self) -> Iterator[Member]:
        first = 0  # offset of the next member
        extended: dict[bytes, bytes] = {}  # its extended headers
        while (header := self._read_header()) is not None:
            first = first if extended else self.offset
            kind, length = header[156:157], self._number(header[124:136], "size")
            if kind not in (b"x", b"g", b"L", b"K"):
                yield self._member(header, extended, first)
                extended = {}
                continue
            content = self._read_extended(length)
            if kind in b"LK":
                key = b"path" if kind == b"L" else b"linkpath"
                self._extend(extended, {key: content.rstrip(b"\0")})
            elif kind == b"x":
                self._extend(extended, self._records(content))
            elif {b"path", b"size"} & self._records(content).keys():
                self._fail("a global header sets the path or size of all members")
        if extended:
            self._fail("an extended header without its member")
        self._check_end()

    def _extend(self, extended: dict[bytes, bytes], records: dict[bytes, bytes]) -> None:
        """Add records. Readers do not agree on which of two extended headers holds."""
        if {b"path", b"linkpath", b"size"} & extended.keys() & records.keys():
            self._fail("two extended headers for one member")
        extended |= records

    def _member(self, header: bytes, extended: dict[bytes, bytes], first: int) -> Member:
        """Return the member of a header, and move to the next header."""
        name = header[:100].split(b"\0")[0]
        if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0")[0]):
            name = prefix + b"/" + name
        name = extended.get(b"path", name)
        if not 0 < len(name) <= LONGEST_NAME or b"\0" in name:
            self._fail(f"a name of {len(name):,} bytes" if b"\0" not in name else "a NUL in a name")
        self.previous = shown(name)
        flag = header[156:157]
        kind = _KINDS.get(flag)
        if kind is None or any(key.startswith(b"GNU.sparse.") for key in extended):
            what = "sparse" if flag in b"0S" else f"of the unsupported type {flag!r}"
            self._fail(f"{self.previous} is {what}. Pack the files again as plain ones,")
        if kind == REGULAR and name.endswith(b"/"):
            kind = OTHER  # a folder, in the format v7
        size = self._number(header[124:136], "size")
        if b"size" in extended:
            size = self._decimal(extended[b"size"])
        if flag in b"123456":  # these have no content, whatever their size
            size = 0
        start = self.offset + BLOCK
        if start + size > self.size:
            self._fail(f"{self.previous} has {size:,} bytes, but the file ends before them;")
        target = extended.get(b"linkpath", header[157:257].split(b"\0")[0])
        self.offset = start + _whole_blocks(size)
        return Member(name, kind, target, first, start, size)

    def _read_header(self) -> bytes | None:
        """Return the next header after a check of its checksum; None for the end mark."""
        header = os.pread(self.descriptor, BLOCK, self.offset)
        if len(header) < BLOCK:
            self._fail("the file ends without an end mark")
        if not header.strip(b"\0"):
            return None
        stored = self._number(header[148:156], "checksum")
        plain = header[:148] + b" " * 8 + header[156:]
        # Some old writers add signed bytes.
        if stored not in (sum(plain), sum(plain) - 256 * len(re.findall(rb"[\x80-\xff]", plain))):
            self._fail("a damaged header or something else than a header")
        return header

    def _read_extended(self, length: int) -> bytes:
        """Return the content of an extended header, and move to the header behind it."""
        if length > LARGEST_HEADER:
            self._fail(f"an extended header of {length:,} bytes")
        content = os.pread(self.descriptor, length, self.offset + BLOCK)
        if len(content) < length:
            self._fail("the file ends within an extended header")
        self.offset += BLOCK + _whole_blocks(length)
        return content

    def _records(self, content: bytes) -> dict[bytes, bytes]:
        """Return the values of an extended header of pax: lines `LENGTH KEY=VALUE`."""
        records, position = {}, 0
        while position < len(content):
            match = RECORD.match(content, position)
            end = position + int(match[1]) if match else 0
            if not match or not match.end() < end <= len(content) or content[end - 1] != 0x0A:
                self._fail("a damaged extended header before the one")
            records[match[2]] = content[match.end() : end - 1]
            position = end
        return records

    def _check_end(self) -> None:
        """Raise an error if anything but zeros follows the end mark."""
        position = self.offset
        while position < self.size:
            position = self._next_data(position)
            chunk = os.pread(self.descriptor, LARGEST_HEADER, position)
            if chunk.strip(b"\0"):
                self.offset = position + len(chunk) - len(chunk.lstrip(b"\0"))
                self._fail("another archive or other data after the end mark")
            if not chunk:
                return
            position += len(chunk)

    def _next_data(self, position: int) -> int:
        """Skip a hole of the file: it could claim any size."""
        if not hasattr(os, "SEEK_DATA"):
            return position
        try:
            return os.lseek(self.descriptor, position, os.SEEK_DATA)
        except OSError as error:  # no data behind this position, or not supported
            return self.size if error.errno == errno.ENXIO else position

    def _number(self, field: bytes, what: str) -> int:
        """Return a number of a header: octal digits, or big-endian after a byte 128."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.rstrip(b"\0 ").lstrip(b" ")
        if not re.fullmatch(rb"[0-7]*", digits):
            self._fail(f"a damaged header (its {what} is no number)")
        return int(digits or b"0", 8)

    def _decimal(self, digits: bytes) -> int:
        if not re.fullmatch(rb"\d{1,19}", digits):
            self._fail(f"the size of {self.previous} is no number;")
        return int(digits)

    def _fail(self, problem: str) -> NoReturn:
        after = f", after {self.previous}" if self.previous else ""
        raise DataError(
            f"{printable(self.path)}: not a complete, uncompressed tar file "
            f"({problem} at byte {self.offset}{after})"
        )


def shown(name: bytes) -> str:
    """Return a name for messages, without control characters and of limited length.

    Example:
        >>> shown(b"a/b" + bytes([10, 255]))
        'a/b\\\\n\\\\udcff'
    """
    text = printable(os.fsdecode(name))
    return text if len(text) <= 200 else text[:200] + "..."


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
