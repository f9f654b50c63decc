"""What a sparse file says about itself, written and read with suspicion.

The header is the one entry `torch-feather` of the file's safetensors metadata: the CRC-32 of what
follows as 8 hexadecimal digits, and JSON:

    version   1
    sparsity  share of zeros among the floating-point tensors with two or more dimensions
    tensors   by name, see LAYOUTS:
              {"layout": "dense", "crc": ..., "zeros": count, if any}
              {"layout": "gaps", "crc": ..., "shape": [...], "width": bits}
    tied      name: the name that its values are stored under
    metadata  whatever the writer wanted to be known: method, config, ...
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, FileFormatError
from .gaps import WIDTHS

KEY = "torch-feather"
VERSION = 1
VALUES, GAPS = ":values", ":gaps"  # what follows a tensor's name in the names of its two parts

# Of safetensors; a name that is not in here is no tensor of ours.
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

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Entry:
    """One tensor of a sparse file, as the header tells it."""

    name: str
    """Under which its values are stored: another one where it is tied."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    nonzeros: int
    """Values other than zero; in the layout `gaps` those stored, -0.0 among them."""
    width: int | None
    """Bits of a code in the layout `gaps`, None where all values are stored."""
    bytes: int
    """That its values and positions take in the file."""
    crc: int
    """See `checksum`."""

    @property
    def layout(self) -> str:
        """`gaps` or `dense`."""
        return "dense" if self.width is None else "gaps"

    @property
    def size(self) -> int:
        """Number of weights, zeros included."""
        return prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """That it takes in memory."""
        return self.size * self.dtype.itemsize

    @property
    def sparsity(self) -> float:
        """Share of zeros (0 for a tensor without elements)."""
        return (self.size - self.nonzeros) / self.size if self.size else 0.0


@dataclass(frozen=True)
class Manifest:
    """All that is known before any data is read."""

    entries: dict[str, Entry]
    sparsity: float
    metadata: dict[str, Any]


Part = tuple[str, tuple[int, ...]]  # a tensor as safetensors has it: name of its type, shape


def write(
    tensors: Mapping[str, Mapping[str, Any]],
    tied: Mapping[str, str],
    sparsity: float,
    metadata: Mapping[str, Any],
) -> dict[str, str]:
    """The safetensors metadata of a file."""
    document = {"version": VERSION, "sparsity": sparsity, "tensors": tensors, "tied": tied}
    try:
        text = json.dumps(
            document | {"metadata": dict(metadata)}, separators=(",", ":"), allow_nan=False
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"metadata must be what JSON can hold: finite numbers, strings, lists, dicts ({error})"
        ) from None
    return {KEY: f"{zlib.crc32(text.encode()):08x}{text}"}


def checksum(dtype: torch.dtype, shape: Iterable[int], parts: Iterable[Tensor]) -> int:
    """CRC-32 of a tensor as it is stored: its type and shape in words, then the bytes of its parts.

    For example of "float32 [10, 64]", then of the values, then of the gaps.
    """
    crc = zlib.crc32(f"{str(dtype).removeprefix('torch.')} {list(shape)}".encode())
    for part in parts:
        crc = zlib.crc32(as_integers(part.reshape(-1)).numpy().data, crc)
    return crc


def as_integers(tensor: Tensor) -> Tensor:
    """The bits of a tensor's values; its own memory."""
    return tensor.view(INTEGERS[tensor.dtype.itemsize])


def read(metadata: Mapping[str, str] | None, parts: Mapping[str, Part]) -> Manifest:
    """Everything that can be checked without the data is checked here.

    Args:
        metadata: of the safetensors file.
        parts: all its tensors.

    Raises:
        FileFormatError: the header is not what this version writes, or contradicts the tensors.
    """
    if KEY not in (metadata or {}):
        raise FileFormatError(
            "a safetensors file, but none that save_sparse wrote; plain ones are read with "
            "safetensors.torch.load_file"
        )
    document = _parse((metadata or {})[KEY])
    version = document.get("version")
    if type(version) is int and version > VERSION:
        raise FileFormatError(
            f"its format version is {version}, this library reads version {VERSION}: update it "
            "with pip install --upgrade torch-feather"
        )
    _require(type(version) is int and version == VERSION, f"format version {version!r:.40}")
    described, tied = _dict(document, "tensors"), _dict(document, "tied")
    entries: dict[str, Entry] = {}
    left = dict(parts)
    for name, description in described.items():
        _require(isinstance(description, dict), f"{name:.80}: its description is no object")
        layout = description.get("layout")
        reader = LAYOUTS.get(layout) if isinstance(layout, str) else None
        if reader is None:
            raise FileFormatError(
                f"{name:.80}: layout {layout!r:.40}, known are {', '.join(LAYOUTS)}"
            )
        entries[name] = reader(name, description, left)
    _require(not left, f"tensors that its header does not know: {', '.join(left):.80}")
    stored = dict(entries)
    for alias, name in tied.items():
        right = alias not in stored and isinstance(name, str) and name in stored
        _require(right, f"{alias:.80}: tied to {name!r:.80}")
        entries[alias] = stored[name]
    sparsity = document.get("sparsity")
    if not isinstance(sparsity, int | float) or not 0 <= sparsity <= 1:
        raise FileFormatError(f"sparsity {sparsity!r:.40}")
    return Manifest(entries, float(sparsity), _dict(document, "metadata"))


def _gaps(name: str, description: dict[str, Any], left: dict[str, Part]) -> Entry:
    values, codes = left.pop(name + VALUES, None), left.pop(name + GAPS, None)
    if values is None or codes is None:
        raise FileFormatError(f"{name:.80}: its values or positions are missing")
    shape, width = description.get("shape"), description.get("width")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise FileFormatError(f"{name:.80}: shape {shape!r:.80}")
    size = prod(shape) if len(shape) <= 64 else 2**63
    _require(size < 2**63, f"{name:.80}: shape {shape!r:.80} is more than a tensor can have")
    _require(type(width) is int and width in WIDTHS, f"{name:.80}: width {width!r:.40}")
    _require(len(values[1]) == 1 and values[1][0] <= size, f"{name:.80}: more values than weights")
    _require(codes[0] == "U8" and len(codes[1]) == 1, f"{name:.80}: positions of another type")
    dtype, count = _dtype(name, values), values[1][0]
    stored = count * dtype.itemsize + codes[1][0]
    return Entry(name, tuple(shape), dtype, count, width, stored, _crc(name, description))


def _dense(name: str, description: dict[str, Any], left: dict[str, Part]) -> Entry:
    part, zeros = left.pop(name, None), description.get("zeros", 0)
    if part is None:
        raise FileFormatError(f"{name:.80}: its values are missing")
    dtype, size = _dtype(name, part), prod(part[1])
    _require(type(zeros) is int and 0 <= zeros <= size, f"{name:.80}: zeros {zeros!r:.40}")
    stored = size * dtype.itemsize
    return Entry(name, part[1], dtype, size - zeros, None, stored, _crc(name, description))


def _crc(name: str, description: dict[str, Any]) -> int:
    crc = description.get("crc")
    if type(crc) is not int:
        raise FileFormatError(f"{name:.80}: checksum {crc!r:.40}")
    return crc


# The name of a layout is looked up in here, and nowhere else.
LAYOUTS = {"gaps": _gaps, "dense": _dense}


def _dtype(name: str, part: Part) -> torch.dtype:
    _require(part[0] in DTYPES, f"{name:.80}: values of type {part[0]!r}")
    return DTYPES[part[0]]


def _parse(text: str) -> dict[str, Any]:
    crc, text = text[:8], text[8:]
    _require(crc == f"{zlib.crc32(text.encode()):08x}", "its header does not have its checksum")
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"its header cannot be read ({error!s:.80})") from None
    _require(isinstance(document, dict), "its header is no object")
    return document


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key:.40} twice")
        found[key] = value
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _dict(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = document.get(key)
    if not isinstance(value, dict):
        raise FileFormatError(f"its header has no object {key!r}")
    return value


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise FileFormatError(message)
