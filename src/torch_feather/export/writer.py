"""Writing of sparse files. reader.py describes the format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, warn
from ..files import replace_file
from ..participants import participants
from ..prunable import unwrap
from . import gaps, manifest
from .manifest import GAPS, VALUES, as_integers, plain_name
from .packages import import_safetensors

# Bytes that the layout `gaps` adds to the header: a second name and two lines of JSON.
OVERHEAD = 200


def save_sparse(
    model: nn.Module | Mapping[str, Tensor],
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
    prunable: Iterable[str] | None = None,
) -> None:
    """Save a sparse model in a compact, lossless file with the keys of `model.state_dict()`.

    A model with an attached Sparsifier is saved with its sparse effective weights.

    Args:
        model: a module, which may be wrapped by torch.compile or DistributedDataParallel; or a
            state dict.
        path: the file, which is replaced atomically; on any error it is unchanged.
        dtype: store floating-point tensors with two or more dimensions as this type. float16 and
            bfloat16 halve the storage of float32 values; the storage of their positions does not
            change. Biases, norms and their statistics keep their type. A nonzero weight that would
            become zero becomes the smallest number of the type.
        metadata: any JSON object. `SparseFile.metadata` returns it.
        prunable: names of the weights that took part in sparse training, for `feather.sparsity`.
            None: those that are known of the module.

    Raises:
        ConfigurationError: a file cannot represent the model, or a weight is out of the range of
            `dtype`.
        ImportError: safetensors is not installed.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> import torch_feather as feather
        >>> path = Path(tempfile.mkdtemp()) / "eye.safetensors"
        >>> feather.save_sparse({"weight": torch.eye(1000)}, path)
        >>> path.stat().st_size < 8000  # dense: 4 MB
        True
    """
    if dtype is not None and (not dtype.is_floating_point or dtype not in manifest.DTYPES.values()):
        raise ConfigurationError(
            f"Weights cannot be stored as {dtype}. Use a type such as torch.float16."
        )
    save = import_safetensors().torch.save
    stored, tied = _split_tied(_named_tensors(model))
    parts: dict[str, Tensor] = {}
    descriptions: dict[str, dict[str, Any]] = {}
    weights = zeros = 0
    for name, original in stored.items():
        tensor = _storable(name, original, dtype)
        descriptions[name], own, nonzeros = _smallest(name, tensor, stored.keys())
        descriptions[name]["crc"] = manifest.checksum(tensor.dtype, tensor.shape, own.values())
        parts |= own
        if _is_weight(tensor):
            weights, zeros = weights + tensor.numel(), zeros + tensor.numel() - nonzeros
    _warn_if_dense(zeros, weights)
    sparsity = zeros / weights if weights else 0.0
    known = participants(model) if isinstance(model, nn.Module) else None
    header = manifest.write(descriptions, tied, sparsity, metadata or {}, prunable or known)
    data = save(parts, metadata=header)
    replace_file(Path(path), lambda file: file.write(data))


def _named_tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model by plain name."""
    if isinstance(model, nn.Module):
        model = unwrap(model).state_dict()
    if not isinstance(model, Mapping):
        raise ConfigurationError(
            f"save_sparse requires a module or a state dict, got {type(model).__name__}."
        )
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConfigurationError(
                f"{name!r} is of type {type(value).__name__}, but sparse files hold named tensors "
                "only. Pass the model, or its state_dict() without other entries."
            )
    names = Counter([*map(plain_name, model), "__metadata__"])  # a name of safetensors itself
    if twice := [name for name in model if names[plain_name(name)] > 1]:
        raise ConfigurationError(
            f"{', '.join(twice)}: the name is not unique in the file, where `_orig_mod.` is "
            "removed and `__metadata__` is reserved."
        )
    return {plain_name(name): _resolved(value.detach()) for name, value in model.items()}


def _resolved(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory holds its values: apply lazy conjugation and negation."""
    return tensor.resolve_conj().resolve_neg()


def _split_tied(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to store, and for each tied one the name of the stored one."""
    first: dict[Any, str] = {}
    tied = {}
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.layout == torch.strided and not tensor.is_meta:
            memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if (owner := first.setdefault(memory, name)) != name:
                tied[name] = owner
    return {name: tensor for name, tensor in tensors.items() if name not in tied}, tied


def _storable(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a contiguous tensor on the CPU, of a type that files support."""
    if hasattr(tensor, "full_tensor"):
        raise ConfigurationError(
            f"{name} is sharded. Gather the state first: torch.distributed.checkpoint.state_dict."
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
        )
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise ConfigurationError(f"{name} is {kind}: it has no dense values to store.")
    tensor = tensor.cpu()
    if dtype is not None and _is_weight(tensor):
        exact, tensor = tensor.double(), tensor.to(dtype)
        rounded = tensor.double()
        if ((exact.abs() > torch.finfo(dtype).max) & (exact != rounded)).any():
            raise ConfigurationError(f"{name} has weights out of the range of {dtype}.")
        lost = (rounded == 0) & (exact != 0)
        as_integers(tensor)[lost] |= 1  # the smallest number of the same sign
    if tensor.dtype not in manifest.DTYPES.values():
        raise ConfigurationError(f"{name} is of {tensor.dtype}, which sparse files do not support.")
    return tensor.contiguous()


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
    negative_zeros = 0
    if tensor.is_floating_point():
        sign = 128 if values.itemsize == 1 else np.iinfo(values.dtype).min
        negative_zeros = int(np.count_nonzero(values == sign))
    nonzeros = len(values) - negative_zeros
    taken = name + VALUES in names or name + GAPS in names
    if not taken and values.nbytes + OVERHEAD < bits.nbytes:
        codes, width = gaps.encode(positions)
        if values.nbytes + codes.nbytes + OVERHEAD < bits.nbytes:
            _warn_of_negative_zeros(name, negative_zeros, len(bits))
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


def _warn_of_negative_zeros(name: str, count: int, size: int) -> None:
    if count > 0.01 * size:
        warn(
            f"{name} has {count:,} zeros that are -0.0, which multiplying negative weights by a "
            "mask produces. They are stored like nonzero values, which makes the file larger. To "
            "convert them, add 0.0 to the weights in place."
        )
