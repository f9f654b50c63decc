"""Reading of sparse files.

A sparse file is a safetensors file. Each tensor has the smaller one of two layouts, both lossless:

- `dense`: all values, under the tensor's own name, as in any safetensors file.
- `gaps`: the values whose bits are not all 0 (`NAME:values`), and their positions (`NAME:gaps`,
  see gaps.py).

Tied tensors are stored once. manifest.py describes the header.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, FileFormatError, StateError
from ..participants import remember_names
from ..prunable import unwrap
from . import gaps, hub, manifest
from .manifest import GAPS, VALUES, Entry, as_integers, plain_name
from .packages import import_safetensors

LIMIT = 2**32


def load_sparse(path: str | PathLike[str], model: nn.Module) -> nn.Module:
    """Load a sparse file into a model, as dense tensors.

    The file is read and validated completely before the model is changed.

    Args:
        path: the file; "hf://USER/NAME" or "hf://USER/NAME@REVISION" on the Hugging Face hub.
        model: the same network, on any device. It keeps its types.

    Returns:
        The model.

    Raises:
        FileFormatError: the file is truncated or damaged, has a newer version, or is not a sparse
            file.
        StateError: the file belongs to another model.
        ConfigurationError: `model` is not a module.
        ImportError: safetensors is not installed; for "hf://", huggingface_hub is not installed.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> import torch_feather as feather
        >>> path = Path(tempfile.mkdtemp()) / "model.sparse.safetensors"
        >>> model = torch.nn.Linear(100, 100)
        >>> with torch.no_grad():
        ...     _ = model.weight[1:].zero_()
        >>> feather.save_sparse(model, path)
        >>> other = feather.load_sparse(path, torch.nn.Linear(100, 100))
        >>> torch.equal(other.weight, model.weight)
        True
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"load_sparse(path, model) requires a module, got {type(model).__name__}."
        )
    unwrapped = unwrap(model)
    state = unwrapped.state_dict()
    with SparseFile(path) as file:
        if problems := _differences({plain_name(n): value for n, value in state.items()}, file):
            raise StateError(
                f"{path} does not fit {type(unwrapped).__name__}: {'; '.join(problems)}."
            )
        read = {}
        for entry in file.entries.values():
            if entry.name not in read:
                read[entry.name] = file.tensor(entry.name, limit=None)
        values = {name: read[file.entries[plain_name(name)].name] for name in state}
        prunable = file.prunable
    unwrapped.load_state_dict(values)
    remember_names(model, prunable)
    return model


class SparseFile:
    """An open sparse file. Only the header is read at first; tensors are read on request.

    Nothing in a file is executed, and all contents are validated.

    Args:
        path: as in `load_sparse`, which also lists the errors that opening a file raises.

    Example:
        >>> import tempfile
        >>> import torch_feather as feather
        >>> path = Path(tempfile.mkdtemp()) / "eye.safetensors"
        >>> feather.save_sparse({"weight": torch.eye(1000)}, path, metadata={"kind": "identity"})
        >>> with SparseFile(path) as file:
        ...     for name, entry in file.entries.items():
        ...         print(name, entry.shape, entry.sparsity, entry.layout)
        ...     positions, values = file.nonzeros("weight")
        weight (1000, 1000) 0.999 gaps
        >>> positions[:3]
        tensor([   0, 1001, 2002])
    """

    entries: dict[str, Entry]
    """Tensors by name; a tied tensor under each of its names."""
    sparsity: float
    """Fraction of zeros among the floating-point tensors with two or more dimensions."""
    metadata: dict[str, Any]
    """The metadata that was passed to `save_sparse`."""
    prunable: list[str] | None
    """Names of the weights that took part in sparse training; None if the file has none."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = hub.download(fspath(path)) if hub.is_address(path) else Path(path)
        with _format_errors(self.path):
            self._file = import_safetensors().safe_open(self.path, framework="pt")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            parts = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
            read = manifest.read(self._file.metadata(), parts)
        self.entries, self.sparsity, self.metadata = read.entries, read.sparsity, read.metadata
        self.prunable = read.prunable

    def __enter__(self) -> SparseFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Its header stays available."""
        if self._file is not None:
            self._file.__exit__(None, None, None)
            self._file = None

    def tensor(self, name: str, limit: int | None = LIMIT) -> Tensor:
        """Read a tensor as a dense tensor on the CPU.

        Args:
            name: a key of `entries`.
            limit: largest size of the dense tensor in bytes; None for no limit. A file of a few
                bytes can describe a huge tensor of zeros, so set a limit for untrusted files.

        Raises:
            KeyError: the file has no tensor of this name.
            FileFormatError: the data is damaged, or the tensor is larger than `limit`.
            StateError: the file is closed.
        """
        entry = self.entries[name]
        if entry.width is None:
            return self._read(entry)[0].clone()
        if limit is not None and entry.dense_bytes > limit:
            raise FileFormatError(
                f"{self.path}: {name} requires {entry.dense_bytes:,} bytes of memory, more than "
                f"the limit of {limit:,}. To read it, raise the limit: "
                f"tensor({name!r}, limit=...)."
            )
        positions, values = self.nonzeros(name)
        dense = torch.zeros(entry.size, dtype=entry.dtype)
        as_integers(dense)[positions] = as_integers(values)
        return dense.reshape(entry.shape)

    def nonzeros(self, name: str) -> tuple[Tensor, Tensor]:
        """Read the nonzero values of a tensor and their positions.

        The memory that this needs is proportional to the size of the file.

        Args:
            name: a key of `entries`.

        Returns:
            Positions in the flattened (row-major) tensor in ascending order, int64 of shape (n,);
            and the values, of shape (n,).

        Raises:
            KeyError: the file has no tensor of this name.
            FileFormatError: the data is damaged.
            StateError: the file is closed.
        """
        entry = self.entries[name]
        values, *codes = self._read(entry)
        if entry.width is None:
            flat = values.reshape(-1)
            found = as_integers(flat).ne(0).nonzero().reshape(-1)
            return found, flat[found]
        with _format_errors(self.path, entry.name):
            positions = gaps.decode(codes[0].numpy(), entry.width, len(values), entry.size)
        return torch.from_numpy(positions), values.clone()

    def _read(self, entry: Entry) -> list[Tensor]:
        """Read values and, in the layout `gaps`, codes. They may share memory with the file."""
        if self._file is None:
            raise StateError(f"{self.path} is closed. Read its tensors before closing it.")
        names = [entry.name] if entry.width is None else [entry.name + VALUES, entry.name + GAPS]
        with _format_errors(self.path, entry.name):
            parts = [self._file.get_tensor(name) for name in names]
            if manifest.checksum(entry.dtype, entry.shape, parts) != entry.crc:
                raise FileFormatError(f"{entry.name:.80}: the checksum of the data is wrong")
            if entry.dtype == torch.bool and parts[0].view(torch.uint8).gt(1).any():
                raise FileFormatError(f"{entry.name:.80}: a boolean that is neither 0 nor 1")
        return parts


@contextmanager
def _format_errors(path: Path, name: str = "") -> Iterator[None]:
    """Convert all errors that the contents of a file can cause into FileFormatError."""
    position = f"{path}: {name[:80]}: " if name else f"{path}: "
    try:
        yield
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from None
    except (
        *(ValueError, TypeError, KeyError, RuntimeError),
        import_safetensors().SafetensorError,
    ) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(
            f"{position}truncated, damaged, or not a safetensors file ({first})"
        ) from None


def _differences(state: Mapping[str, Any], file: SparseFile) -> list[str]:
    """Return why a file cannot be loaded, in the terms of `load_state_dict`."""

    def names(kind: str, found: set[str]) -> list[str]:
        shown = sorted(found)[:5] + (["..."] if len(found) > 5 else [])
        return [f"{kind} {', '.join(shown)}"] if found else []

    problems = names("missing key(s) in the file:", state.keys() - file.entries.keys())
    problems += names("unexpected key(s) in the file:", file.entries.keys() - state.keys())
    for name in state.keys() & file.entries.keys():
        own, entry = state[name], file.entries[name]
        if not isinstance(own, Tensor) or own.is_meta:
            problems.append(f"{name} has no values in the model")
        elif hasattr(own, "full_tensor"):
            problems.append(f"{name} is sharded in the model; load the file before sharding")
        elif own.shape != entry.shape:
            problems.append(
                f"{name} has shape {list(entry.shape)} in the file, {list(own.shape)} in the model"
            )
        elif own.dtype != entry.dtype and not (
            own.is_floating_point() and entry.dtype.is_floating_point
        ):
            problems.append(f"{name} is {entry.dtype} in the file, {own.dtype} in the model")
    return problems if len(problems) <= 6 else [*problems[:6], "..."]
