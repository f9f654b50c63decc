"""What is slow to read, such as decoded images, kept between runs."""

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
    """`$TORCH_FEATHER_CACHE`, else `torch-feather` in the user's cache folder."""
    if own := os.environ.get("TORCH_FEATHER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch-feather"


def version(file: Path) -> tuple[str, int, int]:
    """What changes when a file does: its path, size and time of change."""
    stat = file.stat()
    return str(file.resolve()), stat.st_size, stat.st_mtime_ns


def cached(
    name: str, versions: Sequence[object], make: Callable[[], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """What `make` gives, made once per `name` and `versions` of what it reads."""
    key = hashlib.sha256(repr((1, name, list(versions))).encode()).hexdigest()[:20]
    target = cache_folder() / f"{name}-{key}.npz"
    if target.exists():
        try:
            with np.load(target, allow_pickle=False) as stored:  # the zip checks its CRC
                return {key: stored[key] for key in stored.files}
        except Exception:  # damaged in any way: make it anew and overwrite
            pass
    arrays = make()
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            temporary = file.name
            np.savez(file, **arrays)
        os.replace(temporary, target)
    except OSError as error:  # only slower next time
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        message = f"{name} not kept in {target.parent}: {error}"
        warnings.warn(message, FeatherWarning, stacklevel=2)
    return arrays
