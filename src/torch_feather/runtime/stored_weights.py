"""Weights in files of compiled networks: nonzero values, maybe of a narrow type, and positions.

Positions are stored as gaps, as in sparse files (`export.gaps`). Arithmetic is in float32 whatever
the type in the file: values are widened when a file is loaded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..export.conversion import convert
from ..export.gaps import decode, encode
from .layer import Layer
from .taps import Taps

# Types of stored weights: their names in files, and the NumPy type of their bits.
STORED_AS = {
    torch.float32: ("float32", np.float32),
    torch.float16: ("float16", np.int16),
    torch.bfloat16: ("bfloat16", np.int16),
    torch.int8: ("int8", np.int8),
}
LARGEST = 127  # of int8; -128 is not used, so that the range is symmetric


class StoredWeight(NamedTuple):
    """The weight of a layer as a file holds it.

    Attributes:
        description: type, and how positions are stored, as JSON.
        arrays: "values", and if there are zeros "positions"; "scales" of int8.

    Example:
        >>> stored = store_weight("w", torch.eye(100).numpy(), torch.bfloat16)
        >>> sum(array.nbytes for array in stored.arrays.values()) < 300
        True
    """

    description: dict[str, Any]
    arrays: dict[str, np.ndarray]


def check_dtype(dtype: Any) -> torch.dtype:
    """Return the type in which weights are stored.

    Args:
        dtype: a type of `STORED_AS`; None for float32.

    Raises:
        ConfigurationError: it is another one.

    Example:
        >>> check_dtype(None)
        torch.float32
    """
    if dtype is None:
        return torch.float32
    if not isinstance(dtype, torch.dtype) or dtype not in STORED_AS:
        names = ", ".join(f"torch.{name}" for name, _ in STORED_AS.values())
        raise ConfigurationError(
            f"Weights of compiled networks cannot be stored as {dtype!r:.80}. Use one of {names}."
        )
    return dtype


def store_weight(name: str, weight: np.ndarray, dtype: torch.dtype) -> StoredWeight:
    """Return a weight as a file holds it: the nonzero values, or all if that is smaller.

    Args:
        name: the name in errors.
        weight: (out, ...) float32.
        dtype: type of the stored values. A nonzero value that float16 or bfloat16 would round to 0
            becomes the smallest number of the type. int8 is symmetric, with one scale per output
            channel: the largest magnitude divided by 127.

    Raises:
        ConfigurationError: a value is out of the range of the type.

    Example:
        >>> store_weight("w", np.ones((2, 3), np.float32), torch.float32).description
        {'dtype': 'float32'}
    """
    flat = weight.reshape(-1)
    positions = np.flatnonzero(flat)
    kept = _store_values(name, flat[positions], positions // weight[0].size, len(weight), dtype)
    if len(positions) < len(flat):
        codes, width = encode(positions)
        if kept["values"].nbytes + codes.nbytes < len(flat) * kept["values"].itemsize:
            return _described(dtype, {**kept, "positions": codes}, width)
    out = np.arange(len(flat)) // weight[0].size
    return _described(dtype, _store_values(name, flat, out, len(weight), dtype), None)


def store_taps(layer: Layer, taps: Taps, dtype: torch.dtype) -> StoredWeight:
    """Return the nonzero weights of a layer that runs sparse as a file holds them.

    Args:
        layer: the layer. Only the shape of its weight is used.
        taps: its nonzero weights.
        dtype: see `store_weight`.

    Raises:
        ConfigurationError: a value is out of the range of the type.

    Example:
        >>> layer = Layer("w", torch.eye(4), torch.zeros(4))
        >>> stored = store_taps(layer, Taps.from_layer(layer), torch.float16)
        >>> load_taps(layer, stored).values
        array([1., 1., 1., 1.], dtype=float32)
    """
    codes, width = encode(taps.positions(layer))
    kept = _store_values(layer.name, taps.values, taps.out, taps.channels, dtype)
    return _described(dtype, {**kept, "positions": codes}, width)


def load_weight(shape: tuple[int, ...], stored: StoredWeight) -> Tensor:
    """Return a weight as a float32 tensor.

    Args:
        shape: (out, ...).
        stored: what `store_weight` returned.

    Raises:
        ValueError: the positions contradict the values or the shape.

    Example:
        >>> load_weight((2, 2), store_weight("w", np.eye(2, dtype=np.float32), torch.float32))
        tensor([[1., 0.],
                [0., 1.]])
    """
    size = int(np.prod(shape))
    positions = _positions(stored, size)
    weight = np.zeros(size, np.float32)
    weight[positions] = _load_values(stored, positions, size // shape[0])
    return torch.from_numpy(weight.reshape(shape))


def load_taps(layer: Layer, stored: StoredWeight) -> Taps:
    """Return the nonzero weights of a layer.

    Args:
        layer: the layer. Only the shape of its weight is used.
        stored: what `store_taps` returned.

    Raises:
        ValueError: the positions contradict the values or the shape.

    Example:
        >>> layer = Layer("w", torch.eye(3), torch.zeros(3))
        >>> load_taps(layer, store_taps(layer, Taps.from_layer(layer), torch.int8)).out
        array([0, 1, 2])
    """
    positions = _positions(stored, layer.weight.numel())
    values = _load_values(stored, positions, layer.weight[0].numel())
    return Taps.from_positions(layer, values, positions)


def _described(
    dtype: torch.dtype, arrays: dict[str, np.ndarray], width: int | None
) -> StoredWeight:
    description: dict[str, Any] = {"dtype": STORED_AS[dtype][0]}
    return StoredWeight(description if width is None else description | {"width": width}, arrays)


def _positions(stored: StoredWeight, size: int) -> np.ndarray:
    count = len(stored.arrays["values"])
    if "positions" not in stored.arrays:
        if count != size:
            raise ValueError(f"{count} values of {size} weights")
        return np.arange(size)
    return decode(stored.arrays["positions"], stored.description["width"], count, size)


def _store_values(
    name: str, values: np.ndarray, out: np.ndarray, channels: int, dtype: torch.dtype
) -> dict[str, np.ndarray]:
    if dtype == torch.int8:
        largest = np.zeros(channels, np.float32)
        np.maximum.at(largest, out, np.abs(values))
        if not np.isfinite(largest).all():
            raise ConfigurationError(f"{name} has weights that are not finite. Store float32.")
        scales = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1))
        rounded = np.rint(values / scales[out]).clip(-LARGEST, LARGEST)
        return {"values": rounded.astype(np.int8), "scales": scales.astype(np.float32)}
    try:
        narrow = convert(torch.from_numpy(values), dtype)
    except OverflowError:
        raise ConfigurationError(
            f"{name} has weights out of the range of {dtype}, with batch norms folded in. Use a "
            "wider type, such as torch.bfloat16 or torch.float32."
        ) from None
    bits = narrow if dtype == torch.float32 else narrow.view(torch.int16)
    return {"values": bits.numpy()}


def _load_values(stored: StoredWeight, positions: np.ndarray, per_channel: int) -> np.ndarray:
    (dtype,) = (d for d, (name, _) in STORED_AS.items() if name == stored.description["dtype"])
    values = stored.arrays["values"]
    if dtype == torch.int8:
        return values * stored.arrays["scales"][positions // per_channel]
    if values.dtype != STORED_AS[dtype][1]:
        raise ValueError(f"values of {values.dtype} for {dtype}")
    bits = torch.from_numpy(values)
    return (bits if dtype == torch.float32 else bits.view(dtype).float()).numpy()
