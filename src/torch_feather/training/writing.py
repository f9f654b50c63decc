"""Atomic writes into a run directory."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..files import replace_file
from .errors import RunError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file, force it to disk, then move it to `path`.

    If the disk is full, `path` keeps its old content. If the process is killed, the temporary file
    remains too; `remove_temporary_files` deletes it.

    Args:
        path: the file to replace or create.
        write: writes the new content into a binary file.

    Raises:
        RunError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_atomically(path, lambda file: file.write(b"95%"))
        >>> path.read_text()
        '95%'
    """
    try:
        replace_file(path, write)
    except (OSError, RuntimeError) as error:  # torch.save wraps OSError in RuntimeError
        raise RunError(
            f"{path}: cannot be written ({_reason(error)}); its old content is kept"
        ) from error


def remove_temporary_files(folder: Path) -> None:
    """Delete the temporary files of killed writers. No other process may write into `folder`.

    Args:
        folder: the folder; its subfolders stay as they are.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / ".report.json.1234.tmp").touch()
        >>> (folder / "report.json").touch()
        >>> remove_temporary_files(folder)
        >>> [file.name for file in folder.iterdir()]
        ['report.json']
    """
    for temporary in folder.glob(".*.[0-9]*.tmp"):
        with suppress(OSError):
            temporary.unlink()


def _reason(error: BaseException) -> str:
    if not isinstance(error, OSError) and error.__context__ is not None:
        return _reason(error.__context__)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full: free some space, then continue with --resume"
    return str(error).splitlines()[0]


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Args:
        path: the file to replace or create.
        value: nested dicts, lists, texts, numbers, booleans and None.

    Raises:
        RunError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.json"
        >>> write_json(path, {"sparsity": 0.95})
        >>> print(path.read_text())
        {
          "sparsity": 0.95
        }
    """
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def remove_unused(folders: list[Path], files: list[str]) -> None:
    """Remove folders that were created for nothing.

    Args:
        folders: the folders, the innermost first.
        files: files of the first folder that may be removed with it. If it holds others, nothing is
            removed.

    Example:
        >>> import tempfile
        >>> runs = Path(tempfile.mkdtemp()) / "runs"
        >>> (runs / "a").mkdir(parents=True)
        >>> (runs / "a" / ".lock").touch()
        >>> remove_unused([runs / "a", runs], [".lock"])
        >>> runs.exists()
        False
    """
    if not folders or not set(os.listdir(folders[0])) <= set(files):
        return
    with suppress(OSError):  # another program uses one of them now
        for file in files:
            (folders[0] / file).unlink(missing_ok=True)
        for folder in folders:
            folder.rmdir()
