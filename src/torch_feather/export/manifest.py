"""The header of a sparse file: written, read and validated.

The header is the entry `torch-feather` of the file's safetensors metadata. It consists of a CRC-32
checksum as 8 hexadecimal digits, followed by the JSON object that it covers:

    version   1
    sparsity  fraction of zeros among the floating-point tensors with two or more dimensions
    tensors   by name, see LAYOUTS:
              {"layout": "dense", "crc": ..., "zeros": number of zeros, if any}
              {"layout": "gaps", "crc": ..., "shape": [...], "width": bits}
    tied      by name, the name under which the values of a tied tensor are stored
    metadata  what the caller of `save_sparse` passed: method, config, ...
    prunable  names of the weights that took part in sparse training, if they are known
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, FileFormatError
from .conversion import as_integers
from .gaps import WIDTHS, size_of_codes

KEY = "torch-feather"
VERSION = 1
VALUES, GAPS = ":values", ":gaps"  # suffixes of the names of a tensor's two parts

# Types by their names in safetensors. Other types are not supported.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

MAX_DIMENSIONS = 64  # of a tensor in PyTorch
MAX_HEADER = 100_000_000  # bytes, of a safetensors file


@dataclass(frozen=True)
class Entry:
    """A tensor of a sparse file, as described by the header.

    Example:
        >>> entry = Entry("fc.weight", (10, 64), torch.float32, 32, width=4, bytes=180, crc=0)
        >>> entry.layout, entry.sparsity, entry.dense_bytes
        ('gaps', 0.95, 2560)
    """

    name: str
    """Name under which the values are stored. It differs from the tensor's name if it is tied."""
    shape: tuple[int, ...]
    """Shape of the tensor."""
    dtype: torch.dtype
    """Type of the values in the file."""
    nonzeros: int
    """Number of nonzero values. In files of version 0.1, -0.0 counts as nonzero in the layout
    `gaps`."""
    width: int | None
    """Bits of a code in the layout `gaps`; None in the layout `dense`."""
    bytes: int
    """Size of values and positions in the file."""
    crc: int
    """Checksum of the tensor, see `checksum`."""

    @property
    def layout(self) -> str:
        """Layout in the file: `gaps` or `dense`."""
        return "dense" if self.width is None else "gaps"

    @property
    def size(self) -> int:
        """Number of values, including zeros."""
        return prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """Size of the dense tensor in memory."""
        return self.size * self.dtype.itemsize

    @property
    def sparsity(self) -> float:
        """Fraction of zeros; 0 for an empty tensor."""
        return (self.size - self.nonzeros) / self.size if self.size else 0.0


@dataclass(frozen=True)
class Manifest:
    """The contents of a header.

    Attributes:
        entries: tensors by name.
        sparsity: fraction of zeros among the floating-point tensors with two or more dimensions.
        metadata: what the caller of `save_sparse` passed.
        prunable: names of the weights that took part in sparse training; None if unknown.

    Example:
        >>> read(write({}, {}, 0.0, {"method": "feather"}), {})
        Manifest(entries={}, sparsity=0.0, metadata={'method': 'feather'})
    """

    entries: dict[str, Entry]
    sparsity: float
    metadata: dict[str, Any]
    prunable: list[str] | None = field(default=None, repr=False)


Part = tuple[str, tuple[int, ...]]  # a tensor in safetensors: name of its type, shape


def write(
    tensors: Mapping[str, Mapping[str, Any]],
    tied: Mapping[str, str],
    sparsity: float,
    metadata: Mapping[str, Any],
    prunable: Iterable[str] | None = None,
) -> dict[str, str]:
    """Return the safetensors metadata of a sparse file.

    Args:
        tensors: descriptions by name, see LAYOUTS.
        tied: by name, the name under which the values of a tied tensor are stored.
        sparsity: fraction of zeros.
        metadata: any JSON object.
        prunable: names of the weights that took part in sparse training; None if unknown.

    Raises:
        ConfigurationError: JSON cannot represent the metadata.

    Example:
        >>> write({}, {}, 0.0, {})[KEY][8:]
        '{"version":1,"sparsity":0.0,"tensors":{},"tied":{},"metadata":{}}'
    """
    document = {"version": VERSION, "sparsity": sparsity, "tensors": tensors, "tied": tied}
    if prunable is not None:
        document["prunable"] = [n for n in prunable if n in tensors or n in tied]
    try:
        if not isinstance(metadata, Mapping):
            raise TypeError(f"it is of type {type(metadata).__name__}")
        _require_text_keys(metadata)
        text = json.dumps(
            document | {"metadata": dict(metadata)}, separators=(",", ":"), allow_nan=False
        )
        _parse(f"{zlib.crc32(text.encode()):08x}{text}")  # the reader has limits of its own
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            "metadata must consist of JSON types: finite numbers, strings, lists, dicts with "
            f"strings as keys ({error!s:.200})"
        ) from None
    return {KEY: f"{zlib.crc32(text.encode()):08x}{text}"}


def _require_text_keys(value: Any) -> None:
    """Raise TypeError if a dict has keys that JSON would convert to strings."""
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"the key {wrong[0]!r:.40} is of type {type(wrong[0]).__name__}")
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for inner in value:
        _require_text_keys(inner)


def checksum(dtype: torch.dtype, shape: Iterable[int], parts: Iterable[Tensor]) -> int:
    """Return the CRC-32 of a tensor in a file.

    It covers the type and shape as text, such as "float32 [10, 64]", then the bytes of the parts.

    Args:
        dtype: type of the tensor.
        shape: shape of the tensor.
        parts: its values; in the layout `gaps` followed by the codes.

    Example:
        >>> f"{checksum(torch.float32, [2], [torch.ones(2)]):08x}"
        'd507ec56'
    """
    crc = zlib.crc32(f"{str(dtype).removeprefix('torch.')} {list(shape)}".encode())
    for part in parts:
        crc = zlib.crc32(as_integers(part.reshape(-1)).numpy().data, crc)
    return crc


def read(metadata: Mapping[str, str] | None, parts: Mapping[str, Part]) -> Manifest:
    """Read and validate a header. All checks that do not need the data are done here.

    Args:
        metadata: metadata of the safetensors file.
        parts: type and shape of all its tensors, by name.

    Raises:
        FileFormatError: the header is invalid, has another version, or contradicts the tensors.

    Example:
        >>> read({}, {"weight": ("F32", (10, 64))})
        Traceback (most recent call last):
        torch_feather.errors.FileFormatError: not written by save_sparse. Read plain ...
    """
    if KEY not in (metadata or {}):
        raise FileFormatError(
            "not written by save_sparse. Read plain safetensors files with "
            "safetensors.torch.load_file."
        )
    document = _parse((metadata or {})[KEY])
    version = document.get("version")
    if type(version) is int and version > VERSION:
        raise FileFormatError(
            f"format version {version} is newer than version {VERSION}, which this release reads. "
            "Update it: pip install --upgrade torch-feather"
        )
    _require(type(version) is int and version == VERSION, f"invalid format version {version!r:.40}")
    described, tied = _object(document, "tensors"), _object(document, "tied")
    entries: dict[str, Entry] = {}
    left = dict(parts)
    for name, description in described.items():
        _require(isinstance(description, dict), f"{name:.80}: the description is not an object")
        layout = description.get("layout")
        reader = LAYOUTS.get(layout) if isinstance(layout, str) else None
        if reader is None:
            raise FileFormatError(
                f"{name:.80}: unknown layout {layout!r:.40}; known layouts: {', '.join(LAYOUTS)}"
            )
        entries[name] = reader(name, description, left)
    _require(not left, f"tensors that the header does not describe: {', '.join(left):.80}")
    stored = dict(entries)
    for alias, name in tied.items():
        valid = alias not in stored and isinstance(name, str) and name in stored
        _require(valid, f"{alias:.80}: invalid tie to {name!r:.80}")
        entries[alias] = stored[name]
    return Manifest(
        entries,
        _sparsity(document, stored),
        _object(document, "metadata"),
        _prunable(document, entries),
    )


def _sparsity(document: Mapping[str, Any], entries: Mapping[str, Entry]) -> float:
    """Return the sparsity. Zeros that version 0.1 counted as nonzero (-0.0) may be in addition."""
    sparsity = document.get("sparsity")
    if type(sparsity) not in (int, float) or not 0 <= sparsity <= 1:  # type: ignore[operator]
        raise FileFormatError(f"invalid sparsity {sparsity!r:.40}")
    sparsity = float(sparsity)  # type: ignore[arg-type]
    weights = [e for e in entries.values() if e.dtype.is_floating_point and len(e.shape) >= 2]
    size, zeros = sum(e.size for e in weights), sum(e.size - e.nonzeros for e in weights)
    valid = sparsity * size >= zeros * (1 - 1e-9)
    _require(valid, f"sparsity {sparsity}, but {zeros:,} of {size:,} weights are zero")
    return sparsity


def _prunable(document: Mapping[str, Any], entries: Mapping[str, Entry]) -> list[str] | None:
    names = document.get("prunable")
    if names is None:
        return None
    valid = isinstance(names, list) and all(isinstance(n, str) and n in entries for n in names)
    _require(valid, "the names of prunable weights are invalid")
    return names


def _read_gaps(name: str, description: dict[str, Any], left: dict[str, Part]) -> Entry:
    values, codes = left.pop(name + VALUES, None), left.pop(name + GAPS, None)
    if values is None or codes is None:
        raise FileFormatError(f"{name:.80}: values or positions are missing")
    shape, width = description.get("shape"), description.get("width")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise FileFormatError(f"{name:.80}: invalid shape {shape!r:.80}")
    dtype, size = _dtype(name, values), _size(name, shape)
    if not isinstance(width, int) or isinstance(width, bool) or width not in WIDTHS:
        raise FileFormatError(f"{name:.80}: invalid width {width!r:.40}")
    _require(len(values[1]) == 1 and values[1][0] <= size, f"{name:.80}: more values than weights")
    _require(
        codes[0] == "U8" and len(codes[1]) == 1, f"{name:.80}: positions are not a uint8 vector"
    )
    count, length = values[1][0], codes[1][0]
    least, most = size_of_codes(width, count, size)
    _require(
        least <= length <= most,
        f"{name:.80}: {length:,} bytes of positions for {count:,} values in a tensor of {size:,} "
        f"weights, which take {least:,} to {most:,} bytes",
    )
    stored = count * dtype.itemsize + length
    return Entry(name, tuple(shape), dtype, count, width, stored, _crc(name, description))


def _read_dense(name: str, description: dict[str, Any], left: dict[str, Part]) -> Entry:
    part, zeros = left.pop(name, None), description.get("zeros", 0)
    if part is None:
        raise FileFormatError(f"{name:.80}: values are missing")
    dtype, size = _dtype(name, part), _size(name, part[1])
    _require(
        type(zeros) is int and 0 <= zeros <= size,
        f"{name:.80}: invalid number of zeros {zeros!r:.40}",
    )
    stored = size * dtype.itemsize
    return Entry(name, part[1], dtype, size - zeros, None, stored, _crc(name, description))


def _size(name: str, shape: Sequence[int]) -> int:
    """Return the number of values of a shape. Its strides must be numbers of 64 bits, too."""
    bounded = len(shape) <= MAX_DIMENSIONS and all(n < 2**63 for n in shape)
    if not bounded or prod(max(n, 1) for n in shape) >= 2**60:  # of up to 8 bytes
        raise FileFormatError(f"{name:.80}: shape {shape!r:.80} is too large for a tensor")
    return prod(shape)


def _crc(name: str, description: dict[str, Any]) -> int:
    crc = description.get("crc")
    if type(crc) is not int or not 0 <= crc < 2**32:
        raise FileFormatError(f"{name:.80}: invalid checksum {crc!r:.40}")
    return crc


# Readers by layout. A layout name from a file is only looked up in this table.
LAYOUTS = {"gaps": _read_gaps, "dense": _read_dense}


def _dtype(name: str, part: Part) -> torch.dtype:
    _require(part[0] in DTYPES, f"{name:.80}: unsupported type {part[0]!r}")
    return DTYPES[part[0]]


def _parse(text: str) -> dict[str, Any]:
    crc, text = text[:8], text[8:]
    _require(crc == f"{zlib.crc32(text.encode()):08x}", "the checksum of the header is wrong")
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"the header cannot be read ({error!s:.80})") from None
    _require(isinstance(document, dict), "the header is not an object")
    return document


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key:.40}")
        found[key] = value
    return found


def _reject_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _object(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    if not isinstance(value, dict):
        raise FileFormatError(f"the header has no object {key!r}")
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise FileFormatError(message)


def plain_name(name: str) -> str:
    """Return the name of a tensor without the prefixes that torch.compile adds.

    Example:
        >>> plain_name("encoder._orig_mod.weight")
        'encoder.weight'
    """
    return name.replace("_orig_mod.", "")
