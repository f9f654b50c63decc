"""Sparse files: one safetensors file that holds the nonzero weights and where they are.

Each tensor is stored in the smaller of two layouts, bit for bit: all its values, under its own
name as in any safetensors file; or the values other than zero (`NAME:values`) and the gaps between
them (`NAME:gaps`, see gaps.py). Tied tensors are stored once. What else is in it: manifest.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, FileFormatError, StateError, warn
from ..files import replace_file
from ..prunable import unwrap
from . import gaps, hub, manifest
from .manifest import GAPS, VALUES, Entry, as_integers

# What a sparse tensor adds to the file beside its data: a second name, two lines of JSON.
OVERHEAD = 200
LIMIT = 2**32


def save_sparse(
    model: nn.Module | Mapping[str, Tensor],
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Store a sparse model in little space, bit for bit, keys as in `model.state_dict()`.

    A model that a Sparsifier is still attached to is stored as the network sees it, sparse.

    Args:
        model: a module, also one wrapped by torch.compile or DistributedDataParallel; or a state
            dict.
        path: the file; what it held is replaced in one stroke or, on any failure, kept.
        dtype: what floating-point tensors with two or more dimensions are converted to, such as
            `torch.float16`. Biases, norms and their statistics keep their own. A weight too small
            for it becomes its smallest number, so that no more weights are zero than were.
        metadata: anything that JSON can hold, to be read as `SparseFile.metadata`.

    Raises:
        ConfigurationError: something that no file can hold, or a weight beyond the range of
            `dtype`.
        ImportError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    if dtype is not None and (not dtype.is_floating_point or dtype not in manifest.DTYPES.values()):
        raise ConfigurationError(
            f"weights cannot be stored as {dtype}: choose such as torch.float16"
        )
    save = _safetensors().torch.save
    stored, tied = _without_ties(_tensors(model))
    parts: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    weights = zeros = 0
    for name, original in stored.items():
        tensor = _storable(name, original, dtype)
        described[name], own, nonzeros = _smallest(name, tensor, stored.keys())
        described[name]["crc"] = manifest.checksum(tensor.dtype, tensor.shape, own.values())
        parts |= own
        if _is_weight(tensor):
            weights, zeros = weights + tensor.numel(), zeros + tensor.numel() - nonzeros
    if 32 * zeros <= weights:  # to say where they are takes as much
        warn(
            "This model is not sparse: the file will be as large as a dense one. Are these the "
            "latent weights, or those of a model that was never pruned? The sparse weights are "
            "those of the model itself, before Sparsifier.detach() or after finalize()."
        )
    sparsity = zeros / weights if weights else 0.0
    about = manifest.write(described, tied, sparsity, metadata or {})
    data = save(parts, metadata=about)
    replace_file(Path(path), lambda file: file.write(data))


def load_sparse(path: str | PathLike[str], model: nn.Module) -> nn.Module:
    """Fill `model` with what `save_sparse` stored: plain dense tensors, on whatever device.

    Everything is read and checked first; the model is changed only when all of it fits.

    Args:
        path: the file, or "hf://USER/NAME" or "hf://USER/NAME@REVISION" on the Hugging Face hub.
        model: of the same network; its dtypes stay what they are.

    Returns:
        The model.

    Raises:
        FileFormatError: the file is truncated, damaged, of a newer version, or no sparse file.
        StateError: the file is of another model.
        ConfigurationError: `model` is no module.
        ImportError: safetensors is not installed (huggingface_hub for "hf://").
        OSError: the file cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"load_sparse(path, model) fills a module, got {type(model).__name__}."
        )
    model_ = unwrap(model)
    state = model_.state_dict()
    with SparseFile(path) as file:
        if problems := _differences({_plain(name): value for name, value in state.items()}, file):
            raise StateError(f"{path} does not fit {type(model_).__name__}: {'; '.join(problems)}.")
        read = {}
        for entry in file.entries.values():
            if entry.name not in read:
                read[entry.name] = file.tensor(entry.name, limit=None)
        values = {name: read[file.entries[_plain(name)].name] for name in state}
    model_.load_state_dict(values)
    return model


class SparseFile:
    """A sparse file, opened: what is in it is known, tensors are read one by one when asked for.

        with SparseFile(path) as file:
            for name, entry in file.entries.items():
                print(name, entry.shape, entry.sparsity)
            weight = file.tensor("conv1.weight")

    Nothing in a file is executed, and what it says is checked before it is believed.
    """

    entries: dict[str, Entry]
    """By name, tied tensors under each of their names."""
    sparsity: float
    """Share of zeros among the floating-point tensors with two or more dimensions."""
    metadata: dict[str, Any]
    """What the writer wanted to be known."""

    def __init__(self, path: str | PathLike[str]) -> None:
        """Opens it; raises what `load_sparse` raises."""
        self.path = hub.download(fspath(path)) if hub.is_address(path) else Path(path)
        with _reading(self.path):
            self._file = _safetensors().safe_open(self.path, framework="pt")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            parts = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
            read = manifest.read(self._file.metadata(), parts)
        self.entries, self.sparsity, self.metadata = read.entries, read.sparsity, read.metadata

    def __enter__(self) -> SparseFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing can be read from it any more."""
        if self._file is not None:
            self._file.__exit__(None, None, None)
            self._file = None

    def tensor(self, name: str, limit: int | None = LIMIT) -> Tensor:
        """All values of one tensor, zeros included, on the CPU.

        Args:
            name: one of `entries`; KeyError for any other.
            limit: bytes. A file of a few bytes may rightly describe a large tensor of zeros, so
                that this is what protects the memory where the file is a stranger's.

        Raises:
            FileFormatError: its data is damaged, or the tensor would take more than `limit`.
        """
        entry = self.entries[name]
        if entry.width is None:
            return self._read(entry)[0].clone()
        if limit is not None and entry.dense_bytes > limit:
            raise FileFormatError(
                f"{self.path}: {name} would take {entry.dense_bytes:,} bytes of memory, the limit "
                f"is {limit:,}; a larger one can be given: tensor({name!r}, limit=...)"
            )
        positions, values = self.nonzeros(name)
        dense = torch.zeros(entry.size, dtype=entry.dtype)
        as_integers(dense)[positions] = as_integers(values)
        return dense.reshape(entry.shape)

    def nonzeros(self, name: str) -> tuple[Tensor, Tensor]:
        """Where one tensor is not zero, without its zeros: for runtimes and statistics.

        Memory is bounded by the size of the file, whatever it says.

        Returns:
            Positions in the flattened (row-major) tensor, rising, int64 of shape (n,), and the
            values there, (n,).

        Raises:
            FileFormatError: its data is damaged.
        """
        entry = self.entries[name]
        values, *codes = self._read(entry)
        if entry.width is None:
            flat = values.reshape(-1)
            found = as_integers(flat).ne(0).nonzero().reshape(-1)
            return found, flat[found]
        with _reading(self.path, entry.name):
            positions = gaps.decode(codes[0].numpy(), entry.width, len(values), entry.size)
        return torch.from_numpy(positions), values.clone()

    def _read(self, entry: Entry) -> list[Tensor]:
        """Its values and, in the layout `gaps`, its codes; they may be the file's own memory."""
        if self._file is None:
            raise StateError(f"{self.path} was closed; read its tensors before that")
        names = [entry.name] if entry.width is None else [entry.name + VALUES, entry.name + GAPS]
        with _reading(self.path, entry.name):
            parts = [self._file.get_tensor(name) for name in names]
            if manifest.checksum(entry.dtype, entry.shape, parts) != entry.crc:
                raise FileFormatError(f"{entry.name:.80}: its data does not have its checksum")
            if entry.dtype == torch.bool and parts[0].view(torch.uint8).gt(1).any():
                raise FileFormatError(f"{entry.name:.80}: a truth value that is neither 0 nor 1")
        return parts


@contextmanager
def _reading(path: Path, name: str = "") -> Iterator[None]:
    """Whatever bytes do to a reader, the answer is the same."""
    where = f"{path}: {name[:80]}: " if name else f"{path}: "
    try:
        yield
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, RuntimeError, _safetensors().SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(f"{where}truncated, damaged, or no such file ({first})") from None


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "sparse files need safetensors: pip install 'torch-feather[files]'"
        ) from error
    return safetensors


def _tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By plain name, not yet checked."""
    if isinstance(model, nn.Module):
        model = unwrap(model).state_dict()
    if not isinstance(model, Mapping):
        raise ConfigurationError(
            f"save_sparse takes a module or a state dict, got {type(model).__name__}."
        )
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConfigurationError(
                f"{name!r} is of type {type(value).__name__}: a sparse file holds named tensors. "
                "Give the model itself, or its state_dict() without what is no tensor."
            )
    names = Counter([*map(_plain, model), "__metadata__"])  # of safetensors itself
    if twice := [name for name in model if names[_plain(name)] > 1]:
        raise ConfigurationError(
            f"{', '.join(twice)}: in the file this would be the name of something else too, since "
            "`_orig_mod.` is left out there and `__metadata__` is the format's own"
        )
    return {_plain(name): _values(value.detach()) for name, value in model.items()}


def _values(tensor: Tensor) -> Tensor:
    """As they lie in memory: views that conjugate or negate when they are read, carried out."""
    return tensor.resolve_conj().resolve_neg()


def _plain(name: str) -> str:
    """Without what torch.compile adds for a module inside."""
    return name.replace("_orig_mod.", "")


def _without_ties(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Those to store, and the others: by name, the name of the stored one that has their memory."""
    first: dict[Any, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.layout == torch.strided and not tensor.is_meta:
            memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if (owner := first.setdefault(memory, name)) != name:
                tied[name] = owner
    return {name: tensor for name, tensor in tensors.items() if name not in tied}, tied


def _storable(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """On the CPU, contiguous, of a type that files have."""
    if hasattr(tensor, "full_tensor"):
        raise ConfigurationError(
            f"{name} is sharded. Gather the state first: torch.distributed.checkpoint.state_dict."
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
        )
    if tensor.is_meta or tensor.layout != torch.strided:
        place = "the meta device" if tensor.is_meta else f"layout {tensor.layout}"
        raise ConfigurationError(f"{name} is of {place}: it has no dense values to store.")
    tensor = tensor.cpu()
    if dtype is not None and _is_weight(tensor):
        exact, tensor = tensor.double(), tensor.to(dtype)
        found = tensor.double()
        if ((exact.abs() > torch.finfo(dtype).max) & (exact != found)).any():
            raise ConfigurationError(f"{name} has weights beyond the range of {dtype}.")
        lost = (found == 0) & (exact != 0)
        as_integers(tensor)[lost] |= 1  # the smallest number, of the same sign
    if tensor.dtype not in manifest.DTYPES.values():
        raise ConfigurationError(f"{name} is of {tensor.dtype}, which sparse files do not have.")
    return tensor.contiguous()


def _is_weight(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() >= 2


def _smallest(
    name: str, tensor: Tensor, names: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """Description, parts by name, and the number of values other than zero."""
    bits = as_integers(tensor.reshape(-1)).numpy()
    positions = np.flatnonzero(bits)
    values = bits[positions]
    negative = 0
    if tensor.is_floating_point():
        sign = 128 if values.itemsize == 1 else np.iinfo(values.dtype).min
        negative = int(np.count_nonzero(values == sign))
    nonzeros = len(values) - negative
    taken = name + VALUES in names or name + GAPS in names
    if not taken and values.nbytes + OVERHEAD < bits.nbytes:
        codes, width = gaps.encode(positions)
        if values.nbytes + codes.nbytes + OVERHEAD < bits.nbytes:
            _warn_of_negative_zeros(name, negative, len(bits))
            description = {"layout": "gaps", "shape": list(tensor.shape), "width": width}
            own = torch.from_numpy(values).view(tensor.dtype), torch.from_numpy(codes)
            return description, dict(zip((name + VALUES, name + GAPS), own, strict=True)), nonzeros
    zeros = {"zeros": len(bits) - nonzeros} if nonzeros < len(bits) else {}
    return {"layout": "dense"} | zeros, {name: tensor}, nonzeros


def _warn_of_negative_zeros(name: str, count: int, size: int) -> None:
    if count > 0.01 * size:
        warn(
            f"{name} has {count:,} zeros that are -0.0, as a mask multiplied with negative weights "
            "leaves them. They are stored bit for bit like any other value, which makes the file "
            "larger; adding 0.0 to the weights in place turns them into plain zeros."
        )


def _differences(state: Mapping[str, Any], file: SparseFile) -> list[str]:
    """What keeps the file from being loaded, in the words of load_state_dict."""

    def names(what: str, found: set[str]) -> list[str]:
        shown = sorted(found)[:5] + (["..."] if len(found) > 5 else [])
        return [f"{what} {', '.join(shown)}"] if found else []

    problems = names("missing key(s) in the file:", state.keys() - file.entries.keys())
    problems += names("unexpected key(s) in the file:", file.entries.keys() - state.keys())
    for name in state.keys() & file.entries.keys():
        mine, entry = state[name], file.entries[name]
        if not isinstance(mine, Tensor) or mine.is_meta:
            problems.append(f"{name} is no tensor with memory in the model")
        elif hasattr(mine, "full_tensor"):
            problems.append(f"{name} is sharded in the model: load it before it is sharded")
        elif mine.shape != entry.shape:
            problems.append(
                f"{name} has shape {list(entry.shape)} in the file, {list(mine.shape)} in the model"
            )
        elif mine.dtype != entry.dtype and not (
            mine.is_floating_point() and entry.dtype.is_floating_point
        ):
            problems.append(f"{name} is {entry.dtype} in the file, {mine.dtype} in the model")
    return problems if len(problems) <= 6 else [*problems[:6], "..."]
