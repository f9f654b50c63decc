"""Checksums of weights, the same however a weight is sharded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..threads import for_each
from . import compiled
from .compiled import COLUMNS
from .latent import BLOCK, LatentWeights


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


_FACTORS = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, COLUMNS) | 1


_ROWS = 64  # rows at a time: they stay in the cache while their sum is computed


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
    return checksum_and_nan(tensor, with_nan=False)[0]


def checksum_and_nan(tensor: Tensor, with_nan: bool = True) -> tuple[int, bool]:
    """Return `checksum` and, from the same pass over memory, whether a value is NaN.

    Args:
        tensor: dense in memory, on any device.
        with_nan: whether to look for NaN; False is returned otherwise.

    Example:
        >>> checksum_and_nan(torch.tensor([1.0, torch.nan]))[1]
        True
    """
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).cpu()
    data = flat.view(torch.uint8).numpy()
    words = data[: data.size // 8 * 8].view(np.int64)
    step, width, start = _ROWS * COLUMNS, tensor.element_size(), 0
    columns, nan = np.zeros(COLUMNS, np.int64), False
    if tensor.dtype == torch.float32 and compiled.kernels() is not None:
        start = words.size // COLUMNS * COLUMNS
        columns, nan = _scan(words[:start])
    for a in range(start, words.size, step):
        block = words[a : a + step]
        if with_nan:
            nan |= _has_nan(flat[a * 8 // width : (a + step) * 8 // width])
        if width == 8:
            # Sign bits would be the topmost bits, and an even number of them cancels: mix them in.
            block = block ^ (block.view(np.uint64) >> 1).view(np.int64)
        full = block.size // COLUMNS * COLUMNS
        columns += np.add.reduce(block[:full].reshape(-1, COLUMNS), axis=0)
        columns[: block.size - full] += block[full:]
    rest = data[words.size * 8 :]
    if with_nan:
        nan |= _has_nan(flat[words.size * 8 // width :])
    word = int.from_bytes(rest.tobytes(), "little")
    return _signed(int(np.dot(columns, _FACTORS)) + word * int(_FACTORS[-1])), nan


def _scan(words: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the columns of full rows, and whether a weight is NaN, from compiled code."""
    size = 8 * _ROWS * COLUMNS
    blocks = [words[a : a + size] for a in range(0, words.size, size)]
    columns = np.zeros((len(blocks), COLUMNS), np.int64)
    nan = for_each(lambda i: compiled.scan(blocks[i], columns[i]), range(len(blocks)))
    return columns.sum(axis=0), any(nan)


def _has_nan(flat: Tensor) -> bool:
    """Return whether a value is NaN."""
    if flat.numel() == 0:
        return False
    if flat.element_size() == 2:  # NumPy has no bfloat16, and float16 is slow there
        return bool(flat.sum(dtype=torch.float32).isnan())
    return bool(np.isnan(np.maximum.reduce(flat.numpy())))


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
    return _signed(int(np.dot(bits << shift, _FACTORS.view(np.uint64)[column])))


def _signed(word: int) -> int:
    """Return a number modulo 2^64 as a signed 64-bit integer."""
    word %= 2**64
    return word - 2**64 if word >= 2**63 else word
