"""Atomic writes."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from .errors import ConfigurationError

ACL = "system.posix_acl_access"  # the extended attribute of Linux that lists who may access a file


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file atomically: at any time it has its old or its new content.

    The content is written to a temporary file in the same directory, forced to disk, and renamed.
    If `path` is a symbolic link, the file that it points to is replaced. An existing file keeps its
    mode, owner, group and access control list. If this process may not set the group, the new group
    gets the access of all other users. A new file has the mode that the umask allows.

    On any error, which is passed on, `path` is unchanged and the temporary file is removed. If the
    process is killed, the temporary file may remain.

    Args:
        path: the file; it need not exist.
        write: function that writes the content to an open binary file.

    Raises:
        OSError: the file cannot be written, or `path` is a directory, a device or another special
            file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "file"
        >>> replace_file(path, lambda file: file.write(b"content"))
        >>> path.read_bytes()
        b'content'
    """
    path = Path(os.path.realpath(path))  # replace the target of a link, not the link
    old = _status(path)
    # A file of its own for each process and thread. Until it has the access rights of the old
    # file, only this user can read it.
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
    if not path.parent.is_dir():  # otherwise the error would name the temporary file
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(temporary, flags, 0o666 if old is None else 0o600)
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            if old is not None:
                _copy_access(path, old, temporary)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def to_path(path: object) -> Path:
    """Return a path argument as `Path`.

    Raises:
        ConfigurationError: the argument cannot be the path of a file.

    Example:
        >>> to_path("a/b").name
        'b'
    """
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
        if not isinstance(text, str) or "\0" in text or not text:
            raise ValueError("it must be a non-empty string without null characters")
        os.fsencode(text)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{path!r:.80} is not the path of a file ({error}). Pass a string or a Path."
        ) from None
    return Path(text)


def _status(path: Path) -> os.stat_result | None:
    """Return the status of a regular file; None if there is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        reason = os.strerror(code) if code == errno.EISDIR else "Not a regular file"
        raise OSError(code, reason, str(path))
    return status


def _copy_access(path: Path, old: os.stat_result, new: Path) -> None:
    """Give a new file the owner, group, mode and access control list of an old one.

    What this process may not set is left out, in such a way that nobody gets access who had none.
    """
    mode, copied = stat.S_IMODE(old.st_mode), True
    if hasattr(os, "chown"):
        with suppress(OSError):
            os.chown(new, old.st_uid, -1)
        try:
            os.chown(new, -1, old.st_gid)
        except OSError:
            copied = False
    if hasattr(os, "listxattr"):
        copied = _copy_list(path, new) and copied
    if not copied:  # neither another group nor all others may do more than both might before
        both = mode >> 3 & mode & 0o007
        mode = mode & ~0o2077 | both << 3 | both
    os.chmod(new, mode)


def _copy_list(path: Path, new: Path) -> bool:
    """Copy the access control list, or remove that of the directory; return whether it worked."""
    try:
        if ACL in os.listxattr(path):
            os.setxattr(new, ACL, os.getxattr(path, ACL))
        elif ACL in os.listxattr(new):
            os.removexattr(new, ACL)
    except OSError as error:
        return error.errno == errno.ENOTSUP  # this file system has no lists
    return True
