"""Reading of regular files alone: a FIFO or a device could be read without end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import DataError, printable

LARGEST = 2**30  # bytes of one encoded image


def open_regular(path: Path) -> tuple[int, int]:
    """Open a file for reading.

    Args:
        path: the file, or a link to it.

    Returns:
        Its descriptor, to be closed by the caller, and its size in bytes.

    Raises:
        OSError: the file cannot be opened.
        DataError: it is no regular file.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     descriptor, size = open_regular(Path(file.name))
        >>> os.close(descriptor)
        >>> size
        0
    """
    # O_NONBLOCK: opening a FIFO would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise DataError(f"{printable(path)}: not a regular file. Remove it.")
    return descriptor, found.st_size


def read_regular(path: Path, largest: int = LARGEST) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file, or a link to it.
        largest: the largest number of bytes to read.

    Raises:
        OSError: the file cannot be opened.
        DataError: it is no regular file, or larger than `largest`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "a.png")
        ...     written = file.write_bytes(b"pixels")
        ...     read_regular(file)
        b'pixels'
    """
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        # `read` allocates the number of bytes that it is asked for.
        content = file.read(size + 1) if size <= largest else b""
    if size > largest:
        raise DataError(f"{printable(path)}: has {size:,} bytes, but at most {largest:,} are read")
    if len(content) > size:
        raise DataError(f"{printable(path)}: was written to while it was read")
    return content
