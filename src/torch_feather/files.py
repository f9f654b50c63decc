"""Atomic writes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file atomically: at any time it has its old or its new content.

    The content is written to a temporary file in the same directory, forced to disk, and renamed.
    If `path` is a symbolic link, the file that it points to is replaced. On any error, which is
    passed on, `path` is unchanged and the temporary file is removed. If the process is killed, the
    temporary file may remain.

    Args:
        path: the file; it need not exist.
        write: function that writes the content to an open binary file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "file"
        >>> replace_file(path, lambda file: file.write(b"content"))
        >>> path.read_bytes()
        b'content'
    """
    path = Path(os.path.realpath(path))  # replace the target of a link, not the link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # a file of its own for each process and thread
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
