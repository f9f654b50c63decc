"""Checksums of weights, the same however a weight is sharded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..threads import for_each, scratch
from .latent import BLOCK, LatentWeights, flat_bits
from .ranges import COLUMNS, ROW_BYTES

FACTORS = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, COLUMNS) | 1
"""Of the columns: odd int64 numbers."""
_ROWS = 64
_DOT = 8144
"""Values of a dot product: on more than 10,000, OpenBLAS starts threads of its own, which keep the
cores busy for a while that other threads need. Full ranges are a multiple of this."""


def checksum(tensor: Tensor) -> int:
    """Return a number that changes if a value changes, or if values exchange positions.

    The memory is read as rows of 509 64-bit words. The columns are summed, multiplied by odd
    factors and summed again, modulo 2^64. A change of one value always changes the result, other
    changes almost surely. An exchange of two values 509 words apart does not change it.

    Args:
        tensor: dense in memory, on any device.

    Returns:
        A signed 64-bit integer.

    Example:
        >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
        False
    """
    flat = flat_bits(tensor.detach().as_strided((tensor.numel(),), (1,)).cpu())
    step = 4 * _ROWS * ROW_BYTES // flat.itemsize
    parts = for_each(lambda a: checksum_of_rows(flat[a : a + step]), range(0, flat.size, step))
    return _signed(sum(parts))


def checksum_of_rows(bits: np.ndarray) -> int:
    """Return the contribution of some rows of a tensor's memory to its `checksum`.

    The sum of the contributions of all rows, modulo 2^64, is the checksum.

    Args:
        bits: values as integers of their width; the first begins a row.

    Example:
        >>> w = torch.tensor([1.0, 2.0, 3.0])
        >>> checksum_of_rows(flat_bits(w)) == checksum(w)
        True
    """
    per_word = 8 // bits.itemsize
    whole = bits.size // per_word * per_word
    words, rest = bits[:whole].view(np.int64), bits[whole:]
    columns = scratch("columns", COLUMNS, np.int64)
    if per_word == 1:
        # Sign bits would be the topmost bits, and an even number of them cancels: mix them in.
        words = words ^ (words.view(np.uint64) >> 1).view(np.int64)
    full = words.size // COLUMNS * COLUMNS
    np.add.reduce(words[:full].reshape(-1, COLUMNS), axis=0, out=columns)
    if full < words.size:
        columns[: words.size - full] += words[full:]
    if rest.size:  # the bytes of an incomplete last word; only the end of a tensor has one
        columns[-1] += int.from_bytes(rest.tobytes(), "little")
    return int(np.dot(columns, FACTORS))


def may_be_nonfinite(bits: np.ndarray, dtype: torch.dtype) -> bool:
    """Return whether a value may be NaN or infinite; large values give True too.

    Args:
        bits: values as integers of their width.
        dtype: their type.

    Example:
        >>> may_be_nonfinite(flat_bits(torch.tensor([1.0, torch.inf])), torch.float32)
        True
    """
    if bits.size == 0:
        return False
    if bits.itemsize == 2:  # NumPy has no bfloat16, and float16 is slow there
        total = torch.from_numpy(bits).view(dtype).sum(dtype=torch.float32)
        return not bool(total.isfinite())
    values = bits.view(f"f{bits.itemsize}")
    with np.errstate(all="ignore"):  # the fastest pass of NumPy; large values overflow
        return not np.isfinite(dot(values, values))


def dot(a: np.ndarray, b: np.ndarray) -> float:
    """Return the sum of products, computed by one thread.

    Args:
        a: float32 or float64, flat and contiguous.
        b: as `a`.

    Example:
        >>> dot(np.float32([1.0, 2.0]), np.float32([3.0, 4.0]))
        11.0
    """
    whole = a.size // _DOT * _DOT
    total = float(np.dot(a[whole:], b[whole:])) if whole < a.size else 0.0
    if whole:
        # A stack of products of a row and a column, each of which is a dot product of BLAS.
        rows, columns = a[:whole].reshape(-1, 1, _DOT), b[:whole].reshape(-1, _DOT, 1)
        total = sum(np.matmul(rows, columns).ravel().tolist(), total)
    return total


def checksum_of(weights: LatentWeights, i: int, here: Tensor) -> int:
    """Return the `checksum` of the full weight tensor i, given its local shard.

    The result does not depend on the sharding; for contiguous tensors it equals `checksum`.
    All processes must call it.

    Args:
        weights: the latent weights, which define the layout.
        i: position of the weight tensor.
        here: local shard of the values, such as those of the parameter.

    Example:
        >>> w = torch.tensor([1.0, 2.0])
        >>> checksum_of(LatentWeights([w]), 0, w) == checksum(w)
        True
    """
    if weights.shards is None:
        return checksum(here)
    shards, size, total = weights.shards, weights.shapes[i].numel(), 0
    if shards.counted[i]:
        flat = here.detach().flatten()
        for a in range(0, flat.numel(), BLOCK):
            part = flat[a : a + BLOCK]
            total += partial_checksum(part, shards.indices(i, a, a + part.numel()), size)
    return int(shards.sum(torch.tensor(_signed(total))))


def partial_checksum(tensor: Tensor, index: Tensor, size: int) -> int:
    """Return the contribution of some elements to the `checksum` of a contiguous tensor.

    The sum of the contributions of all elements, modulo 2^64, is the checksum.

    Args:
        tensor: the elements, flat and contiguous.
        index: flat index of each in the full tensor, int64 on the CPU.
        size: number of elements of the full tensor.

    Example:
        >>> w = torch.tensor([1.0, 2.0, 3.0])
        >>> first = partial_checksum(w[:2], torch.tensor([0, 1]), 3)
        >>> rest = partial_checksum(w[2:], torch.tensor([2]), 3)
        >>> (first + rest - checksum(w)) % 2**64
        0
    """
    width = tensor.element_size()
    flat = tensor.detach().cpu().view(torch.uint8).numpy()
    bits = flat.view(f"u{width}").astype(np.uint64)
    if width == 8:
        bits ^= bits >> np.uint64(1)
    position, per_word = index.numpy(), 8 // width
    in_words = position < size // per_word * per_word  # the others are in the incomplete last word
    column = np.where(in_words, position // per_word % COLUMNS, -1)
    shift = (position % per_word * 8 * width).astype(np.uint64)
    return _signed(int(np.dot(bits << shift, FACTORS.view(np.uint64)[column])))


def _signed(word: int) -> int:
    """Return a number modulo 2^64 as a signed 64-bit integer."""
    word %= 2**64
    return word - 2**64 if word >= 2**63 else word
