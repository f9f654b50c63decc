"""Writing of sparse files. reader.py describes the format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..errors import ConfigurationError, FileFormatError, warn
from ..files import replace_file, to_path
from ..participants import participants
from ..prunable import unwrap
from . import gaps, manifest
from .conversion import as_integers, convert, without_negative_zeros
from .manifest import GAPS, VALUES, plain_name
from .packages import import_safetensors

# Bytes that the layout `gaps` adds to the header: a second name and two lines of JSON.
OVERHEAD = 200

TYPES = {dtype: name for name, dtype in manifest.DTYPES.items()}
# Types of values that `dtype` accepts.
STORED_AS = {dtype for dtype in manifest.DTYPES.values() if dtype.is_floating_point}


# long: half of it is documentation
def save_sparse(
    model: nn.Module | Mapping[str, Tensor],
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
    prunable: Iterable[str] | None = None,
) -> None:
    """Save a sparse model in a compact, lossless file with the keys of `model.state_dict()`.

    A model with an attached Sparsifier is saved with its sparse effective weights. The sign of a
    zero is not stored: -0.0 becomes 0.0.

    Args:
        model: a module, which may be wrapped by torch.compile or DistributedDataParallel; or a
            state dict.
        path: the file, which is replaced atomically and keeps its mode and owner; on any error it
            is unchanged.
        dtype: store floating-point tensors with two or more dimensions as this type. float16 and
            bfloat16 halve the storage of float32 values; the storage of their positions does not
            change. Biases, norms and their statistics keep their type. A nonzero weight that would
            become zero becomes the smallest number of the type.
        metadata: any JSON object. `SparseFile.metadata` returns it.
        prunable: names of the weights that took part in sparse training, for `feather.sparsity`.
            None: those that are known of the module.

    Raises:
        ConfigurationError: a file cannot represent the model or the metadata, a weight is out of
            the range of `dtype`, or an argument has a wrong type.
        StateError: the model has no state, such as a compiled network.
        ImportError: safetensors is not installed.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch_feather as feather
        >>> path = Path(tempfile.mkdtemp()) / "eye.safetensors"
        >>> feather.save_sparse({"weight": torch.eye(1000)}, path)
        >>> path.stat().st_size < 8000  # dense: 4 MB
        True
    """
    path = to_path(path)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in STORED_AS):
        raise ConfigurationError(
            f"Weights cannot be stored as {dtype!r:.80}. Use a type such as torch.float16."
        )
    save = import_safetensors().torch.save
    stored, tied = _split_tied(_named_tensors(model))
    parts, descriptions, sparsity = _encode(stored, dtype)
    if prunable is None and isinstance(model, nn.Module):
        prunable = participants(model)
    header = manifest.write(
        descriptions, tied, sparsity, {} if metadata is None else metadata, prunable
    )
    try:  # what is written can be read
        manifest.read(header, {n: (TYPES[p.dtype], tuple(p.shape)) for n, p in parts.items()})
    except FileFormatError as error:
        raise ConfigurationError(f"The model cannot be stored: {error}.") from None
    data = save(parts, metadata=header)
    if (size := int.from_bytes(data[:8], "little")) > manifest.MAX_HEADER:
        raise ConfigurationError(
            f"Names and metadata take {size:,} bytes, but at most {manifest.MAX_HEADER:,} can be "
            "read. Store less metadata."
        )
    replace_file(path, lambda file: file.write(data))


def _encode(
    stored: Mapping[str, Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], float]:
    """Return the parts of all tensors, their descriptions, and the fraction of zeros."""
    parts: dict[str, Tensor] = {}
    descriptions: dict[str, dict[str, Any]] = {}
    memories: set[int] = set()
    weights = zeros = 0
    for name, original in stored.items():
        with _tensor_errors(name):
            tensor = _storable(name, original, dtype)
            descriptions[name], own, nonzeros = _smallest(name, tensor, stored.keys())
            descriptions[name]["crc"] = manifest.checksum(tensor.dtype, tensor.shape, own.values())
        for part, values in own.items():
            memory = values.untyped_storage().data_ptr()
            # safetensors stores no two tensors that share memory, such as views of other shapes.
            parts[part] = values.clone() if memory in memories else values
            memories.add(memory)
        if _is_weight(tensor):
            weights, zeros = weights + tensor.numel(), zeros + tensor.numel() - nonzeros
    _warn_if_dense(zeros, weights)
    return parts, descriptions, zeros / weights if weights else 0.0


def _named_tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model by plain name."""
    if isinstance(model, nn.Module):
        model = unwrap(model).state_dict()
    if not isinstance(model, Mapping):
        raise ConfigurationError(
            f"save_sparse requires a module or a state dict, got {type(model).__name__}."
        )
    tensors = dict(model.items())
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConfigurationError(
                f"{name!r:.80} is of type {type(value).__name__}, but sparse files hold named "
                "tensors only. Pass the model, or its state_dict() without other entries."
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ConfigurationError(
                f"{name!r:.80} is not valid Unicode (a surrogate without its pair), so a file "
                "cannot have a tensor of this name. Rename it."
            ) from None
        if isinstance(value, UninitializedParameter | UninitializedBuffer):
            raise ConfigurationError(
                f"{name:.80} is of a lazy layer and has no values yet. Call the model once with an "
                "input first."
            )
    names = Counter([*map(plain_name, tensors), "__metadata__"])  # a name of safetensors itself
    if twice := [name for name in tensors if names[plain_name(name)] > 1]:
        raise ConfigurationError(
            f"{', '.join(twice)}: the name is not unique in the file, where `_orig_mod.` is "
            "removed and `__metadata__` is reserved."
        )
    return {plain_name(name): _resolved(name, value) for name, value in tensors.items()}


def _resolved(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor whose memory holds its values: apply lazy conjugation and negation."""
    with _tensor_errors(name):
        return tensor.detach().resolve_conj().resolve_neg()


@contextmanager
def _tensor_errors(name: str) -> Iterator[None]:
    """Convert the errors of a tensor without values, or of a huge one, to ConfigurationError."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ConfigurationError(f"{name} cannot be stored ({reason:.120}).") from None


def _split_tied(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to store, and for each tied one the name of the stored one."""
    first: dict[Any, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        if _has_memory(tensor) and tensor.numel():
            memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if (owner := first.setdefault(memory, name)) != name:
                tied[name] = owner
    return {name: tensor for name, tensor in tensors.items() if name not in tied}, tied


def _has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor has one value in memory for each of its elements, or may have."""
    own = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)  # not a wrapper of other tensors
    return own and tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested


def _storable(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a contiguous tensor on the CPU, of a type that files support."""
    if hasattr(tensor, "full_tensor"):
        raise ConfigurationError(
            f"{name} is sharded. Gather the state first: torch.distributed.checkpoint.state_dict."
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
        )
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_nested:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        kind = "nested" if tensor.is_nested else kind
        raise ConfigurationError(f"{name} is {kind}: it has no dense values to store.")
    tensor = tensor.cpu().contiguous()
    if dtype is not None and _is_weight(tensor):
        try:
            tensor = convert(tensor, dtype)
        except OverflowError:
            raise ConfigurationError(
                f"{name} has weights out of the range of {dtype}. Use a wider type, such as "
                "torch.bfloat16 or torch.float32."
            ) from None
    if tensor.dtype not in manifest.DTYPES.values():
        raise ConfigurationError(f"{name} is of {tensor.dtype}, which sparse files do not support.")
    return without_negative_zeros(tensor)


def _is_weight(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() >= 2


def _smallest(
    name: str, tensor: Tensor, names: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """Encode a tensor in the smaller layout.

    Returns:
        Its description, its parts by name, and its number of nonzero values.
    """
    bits = as_integers(tensor.reshape(-1)).numpy()
    positions = np.flatnonzero(bits)
    values = bits[positions]
    nonzeros = len(values)
    taken = name + VALUES in names or name + GAPS in names
    if not taken and values.nbytes + OVERHEAD < bits.nbytes:
        codes, width = gaps.encode(positions)
        if values.nbytes + codes.nbytes + OVERHEAD < bits.nbytes:
            description = {"layout": "gaps", "shape": list(tensor.shape), "width": width}
            own = torch.from_numpy(values).view(tensor.dtype), torch.from_numpy(codes)
            return description, dict(zip((name + VALUES, name + GAPS), own, strict=True)), nonzeros
    zeros = {"zeros": len(bits) - nonzeros} if nonzeros < len(bits) else {}
    return {"layout": "dense"} | zeros, {name: tensor}, nonzeros


def _warn_if_dense(zeros: int, weights: int) -> None:
    if 32 * zeros <= weights:  # positions take at least as much space as these zeros
        warn(
            "This model is not sparse: the file will be as large as a dense one. If these are "
            "latent weights, save the model before Sparsifier.detach() or after finalize(), when "
            "it has its sparse weights."
        )
