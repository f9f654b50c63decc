"""A cache on disk for data that is slow to compute, such as decoded images."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FeatherWarning


def cache_folder() -> Path:
    """Return `$TORCH_FEATHER_CACHE`, or `torch-feather` in the user's cache folder.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, {"TORCH_FEATHER_CACHE": "/scratch/cache"}):
        ...     cache_folder().as_posix()
        '/scratch/cache'
    """
    if own := os.environ.get("TORCH_FEATHER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch-feather"


def version(file: Path) -> tuple[str, int, int]:
    """Return path, size and modification time of a file, which identify its content.

    Args:
        file: an existing file.

    Returns:
        The absolute path, the size in bytes, and the time in nanoseconds.

    Raises:
        OSError: the file does not exist.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "images.tar"
        >>> _ = path.write_bytes(b"12345")
        >>> version(path)[1]
        5
    """
    stat = file.stat()
    return str(file.resolve()), stat.st_size, stat.st_mtime_ns


def cached(
    name: str, versions: Sequence[object], make: Callable[[], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Return the arrays of `make`, from the cache if they were computed before.

    Args:
        name: prefix of the cache file.
        versions: the versions of everything that `make` reads.
        make: computes the arrays, by name.

    Example:
        >>> from unittest import mock
        >>> def decode():
        ...     print("decoding")
        ...     return {"pixels": np.zeros(3)}
        >>> with mock.patch.dict(os.environ, {"TORCH_FEATHER_CACHE": tempfile.mkdtemp()}):
        ...     for _ in range(2):  # the second time from the file
        ...         cached("flowers", ["version 1"], decode)["pixels"]
        decoding
        array([0., 0., 0.])
        array([0., 0., 0.])
    """
    key = hashlib.sha256(repr((1, name, list(versions))).encode()).hexdigest()[:20]
    target = cache_folder() / f"{name}-{key}.npz"
    if target.exists():
        try:
            with np.load(target, allow_pickle=False) as stored:  # the zip checks its CRC
                return {key: stored[key] for key in stored.files}
        except Exception:  # damaged: compute it again and overwrite it
            pass
    arrays = make()
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            temporary = file.name
            np.savez(file, **arrays)
        os.replace(temporary, target)
    except OSError as error:  # the next run computes it again
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        message = f"{name}: cannot be cached in {target.parent} ({error})"
        warnings.warn(message, FeatherWarning, stacklevel=2)
    return arrays
