"""Reading checkpoints that may be damaged or hold anything."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import CheckpointError, DamagedCheckpoint

FORMAT = 2


def structure(value: Any) -> str:
    """Return a hash of a nested value: keys, types, shapes, numbers and text.

    The values of tensors are left out; zip files have checksums of them.

    Example:
        >>> structure({"w": torch.zeros(2)}) == structure({"w": torch.ones(2)})
        True
        >>> structure({"w": torch.zeros(2)}) == structure({"w": torch.zeros(3)})
        False
    """
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)};".encode())
        elif isinstance(value, dict):
            found.update(f"dict {len(value)};".encode())
            for key, item in value.items():
                add(key)
                add(item)
        elif isinstance(value, list | tuple):
            found.update(f"list {len(value)};".encode())
            for item in value:
                add(item)
        else:
            found.update(f"{type(value).__name__} {value!r};".encode("utf-8", "replace"))

    add(value)
    return found.hexdigest()


class Found(NamedTuple):
    """A readable checkpoint, and the newer ones that cannot be used, with the reasons.

    Example:
        >>> Found(Path("last.pt"), {"step": 3}, {}).state
        {'step': 3}
    """

    path: Path
    state: dict[str, Any]
    rejected: dict[Path, str]


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, a dict of this format.

    Raises:
        DamagedCheckpoint: the file is damaged, or holds something else.
        CheckpointError: the format is that of another version.
    """
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify checksums
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise zipfile.BadZipFile("compressed")  # torch.save stores; this may be a bomb
            if bad := archive.testzip():
                raise zipfile.BadZipFile(bad)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes may raise anything
        raise DamagedCheckpoint(f"damaged ({type(error).__name__})") from None
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(found, int):
        raise DamagedCheckpoint("not a checkpoint of feather train")
    if found != FORMAT:
        raise CheckpointError(f"{path}: has format {found}, but this version reads {FORMAT}")
    saved = state.pop("structure", None)  # version 0.1 did not write it
    if saved is not None and saved != structure(state):
        raise DamagedCheckpoint("changed after it was written")
    return state


def newest(present: Sequence[Path], rejected: Mapping[Path, str]) -> Found | None:
    """Return the first readable checkpoint that is not rejected; None if there are none.

    No file is changed: see `set_aside`.

    Args:
        present: the checkpoints of a run, the newest first.
        rejected: checkpoints that cannot be used, and why.

    Raises:
        CheckpointError: all checkpoints are rejected or damaged, or one has an unknown format.

    Example:
        >>> newest([], {}) is None
        True
    """
    rejected = dict(rejected)
    for path in present:
        if path in rejected:
            continue
        try:
            return Found(path, _read_checkpoint(path), rejected)
        except DamagedCheckpoint as error:
            rejected[path] = str(error)
    if not present:
        return None
    reasons = "; ".join(f"{path.name}: {rejected[path]}" for path in present)
    raise CheckpointError(
        f"{present[0].parent}: no checkpoint can be used ({reasons}). Nothing was "
        "changed. Start again in another --out."
    )


def set_aside(rejected: Mapping[Path, str], warn: Callable[[str], object]) -> None:
    """Rename checkpoints that cannot be used, so that they do not replace usable ones.

    Args:
        rejected: the checkpoints, and why they cannot be used.
        warn: called with a message for each.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "last.pt"
        >>> path.touch()
        >>> set_aside({path: "damaged (BadZipFile)"}, lambda message: None)
        >>> [file.name for file in path.parent.iterdir()]
        ['last.damaged']
    """
    for path, reason in rejected.items():
        kept, number = path.with_suffix(".damaged"), 1
        while os.path.lexists(kept):
            number += 1
            kept = path.with_suffix(f".damaged-{number}")
        path.rename(kept)
        warn(
            f"{path}: {reason}; resuming from the checkpoint before it. The file is kept as "
            f"{kept.name}."
        )
