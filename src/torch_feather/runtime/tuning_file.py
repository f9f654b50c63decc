"""Files of tuning results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from ..files import replace_file, to_path
from .kernels import Tile
from .tuning import LayerTuning

MAX_TILE = 64  # vectors, values of a vector, or channels; larger ones would take long to compile


def save_tuning(tuning: Mapping[str, LayerTuning], path: str | Path) -> None:
    """Write tuning results as JSON.

    Args:
        tuning: by the name of the layer's weight.
        path: the file, which is replaced atomically.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "tuning.json")
        ...     save_tuning({"weight": LayerTuning(True, Tile(2, 8), 0.9)}, path)
        ...     load_tuning(path)["weight"].sparsity
        0.9
    """
    text = json.dumps({name: asdict(layer) for name, layer in tuning.items()}, indent=1)
    replace_file(to_path(path), lambda file: file.write(f"{text}\n".encode()))


def load_tuning(path: str | Path) -> dict[str, LayerTuning]:
    """Read tuning results that `save_tuning` wrote.

    Args:
        path: the file.

    Raises:
        FileFormatError: it is damaged or holds something else.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "tuning.json")
        ...     _ = path.write_text('{"w": {"sparse": false, "tile": [2, 8], "sparsity": 0.1}}')
        ...     load_tuning(path)["w"].tile
        Tile(vectors=2, width=8, channels=1)
    """
    path = to_path(path)
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise FileFormatError(f"{path} is not a regular file. Pass a file of save_tuning.")
    try:
        found = json.loads(path.read_text())
        return {name: _read_layer(layer) for name, layer in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"{path} holds no tuning results of compile_sparse, or is damaged ({error!r:.200}). "
            "Compile without it and save them again."
        ) from error


def _read_layer(stored: Mapping[str, Any]) -> LayerTuning:
    """Return the tuning of a layer; raise ValueError or TypeError if a value is impossible."""
    layer = LayerTuning(**{**stored, "tile": Tile(*stored["tile"])})
    for length in layer.tile:
        if type(length) is not int or not 1 <= length <= MAX_TILE:
            raise ValueError(f"tile {stored['tile']}")
    times = [t for t in (layer.dense_ms, layer.sparse_ms) if t is not None]
    for number, most in ((layer.sparsity, 1), *((t, math.inf) for t in times)):
        if type(number) not in (int, float) or not 0 <= number <= most or number == math.inf:
            raise ValueError(f"{number!r:.40} is out of range")
    if layer.chunk_size is not None and (type(layer.chunk_size), layer.chunk_size) != (int, 1):
        raise ValueError(f"chunk_size {layer.chunk_size!r:.40}")
    for flag in (layer.sparse, layer.packs):
        if not isinstance(flag, bool):
            raise TypeError(f"{flag!r:.40} is neither true nor false")
    return layer
