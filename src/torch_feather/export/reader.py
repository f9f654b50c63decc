"""Reading of sparse files.

A sparse file is a safetensors file. Each tensor has the smaller one of two layouts, both lossless
except for signs of zeros:

- `dense`: all values, under the tensor's own name, as in any safetensors file.
- `gaps`: the nonzero values (`NAME:values`), and their positions (`NAME:gaps`, see gaps.py).
  Version 0.1 also stored -0.0 as a value.

Tied tensors are stored once. manifest.py describes the header.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, FileFormatError, StateError, printable
from ..files import to_path
from ..participants import remember_names
from ..prunable import unwrap
from . import fitting, gaps, hub, manifest
from .conversion import as_integers, is_zero
from .manifest import GAPS, VALUES, Entry, plain_name
from .packages import import_safetensors

LIMIT = 2**32


def load_sparse(path: str | PathLike[str], model: nn.Module) -> nn.Module:
    """Load a sparse file into a model, as dense tensors.

    The file is read and validated completely before the model is changed.

    Args:
        path: the file; "hf://USER/NAME" or "hf://USER/NAME@REVISION" on the Hugging Face hub.
        model: the same network, on any device. It keeps its types: values are converted, where a
            nonzero value that would become zero becomes the smallest number of the type.

    Returns:
        The model.

    Raises:
        FileFormatError: the file is truncated or damaged, has a newer version, or is not a sparse
            file.
        StateError: the file belongs to another model, a value is out of the range of the model's
            type, or tensors that are tied in the model have different values in the file.
        ConfigurationError: `model` is not a module, or `path` is no path or address.
        ImportError: safetensors is not installed; for "hf://", huggingface_hub is not installed.
        OSError: the file cannot be read or downloaded.

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
    with SparseFile(path) as file:
        _load(file, unwrap(model))
        remember_names(model, file.prunable)
    return model


def _load(file: SparseFile, model: nn.Module) -> None:
    state = model.state_dict()
    read: dict[str, Tensor] = {}  # by the name under which values are stored

    def value(name: str) -> Tensor:
        entry = file.entries[plain_name(name)]
        if entry.name not in read:
            read[entry.name] = file.tensor(entry.name, limit=None)
        return read[entry.name]

    def values() -> dict[str, Tensor]:
        plain = {plain_name(name): value for name, value in state.items()}
        if problems := fitting.differences(plain, file.entries):
            raise StateError("; ".join(problems))
        return fitting.fitted(state, state, value)

    fitting.load(model, values, file.path)


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
        self.path = hub.download(path) if hub.is_address(path) else to_path(path)
        safetensors = import_safetensors()
        if not stat.S_ISREG(self.path.stat().st_mode):  # opening a pipe would wait for a writer
            raise FileFormatError(f"{self.path}: not a regular file")
        with _format_errors(self.path):
            self._file = safetensors.safe_open(self.path, framework="pt")
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
                f"{printable(self.path)}: {printable(name[:80])} requires {entry.dense_bytes:,} "
                f"bytes of memory, more than the limit of {limit:,}. To read it, raise the limit: "
                f"tensor({name!r:.80}, limit=...)."
            )
        values, codes = self._read(entry)
        positions = self._positions(entry, values, codes)
        try:
            dense = torch.zeros(entry.size, dtype=entry.dtype)
        except RuntimeError:  # a MemoryError of PyTorch
            raise FileFormatError(
                f"{printable(self.path)}: {printable(name[:80])} requires {entry.dense_bytes:,} "
                "bytes, more memory than there is"
            ) from None
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
            values = values.reshape(-1)
            positions = torch.arange(len(values))
        else:
            positions = self._positions(entry, values, codes[0])
        found = ~is_zero(values)  # version 0.1 stored -0.0 like nonzero values
        return positions[found], values[found]

    def _positions(self, entry: Entry, values: Tensor, codes: Tensor) -> Tensor:
        """Return the positions of the stored values of the layout `gaps`."""
        assert entry.width is not None
        with _format_errors(self.path, entry.name):
            return torch.from_numpy(
                gaps.decode(codes.numpy(), entry.width, len(values), entry.size)
            )

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
            _check_zeros(entry, parts[0])
        return parts


def _check_zeros(entry: Entry, values: Tensor) -> None:
    """Check the number of zeros. Version 0.1 counted some -0.0 as nonzero."""
    least = int(as_integers(values).eq(0).sum())
    if entry.width is not None:
        if least:
            raise FileFormatError(f"{entry.name:.80}: a stored value is 0")
    elif not least <= entry.size - entry.nonzeros <= int(is_zero(values).sum()):
        raise FileFormatError(f"{entry.name:.80}: the number of zeros is wrong")


@contextmanager
def _format_errors(path: Path, name: str = "") -> Iterator[None]:
    """Convert all errors that the contents of a file can cause into FileFormatError."""
    position = f"{printable(path)}: {printable(name[:80])}: " if name else f"{printable(path)}: "
    try:
        yield
    except FileFormatError as error:
        raise FileFormatError(f"{printable(path)}: {printable(error)}") from None
    except (
        *(ValueError, TypeError, KeyError, RuntimeError, OverflowError),
        import_safetensors().SafetensorError,
    ) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(
            f"{position}truncated, damaged, or not a safetensors file ({printable(first)})"
        ) from None
