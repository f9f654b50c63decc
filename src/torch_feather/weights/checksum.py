"""Checksums of weights, the same however a weight is sharded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .latent import BLOCK, LatentWeights


def checksum_of(weights: LatentWeights, i: int, here: Tensor) -> int:
    """The `checksum` of the whole of parameter i, given what is here of it.

    It is the same however the whole is spread; contiguous tensors have it too.
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


# A prime, so that hardly any exchange of whole rows or channels keeps words in their columns.
_COLUMNS = 509
_FACTORS = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, _COLUMNS) | 1


def checksum(tensor: Tensor) -> int:
    """A number that changes when a value of `tensor` does, or when values change places.

    The memory, as rows of 64-bit words, is summed by column, and the columns with odd factors,
    modulo 2^64, as a signed integer. So any change of one value shows, and others almost surely;
    what cannot show is an exchange of values 509 words apart. The tensor must be dense in memory,
    on any device.
    """
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).cpu()
    data = flat.view(torch.uint8).numpy()
    words = data[: data.size // 8 * 8].view(np.int64)
    if tensor.element_size() == 8:
        # Signs would be the topmost bits, of which an even number cancels: spread them.
        words = words ^ (words.view(np.uint64) >> 1).view(np.int64)
    rows = words.size // _COLUMNS
    columns = np.add.reduce(words[: rows * _COLUMNS].reshape(rows, _COLUMNS), axis=0)
    columns[: words.size - rows * _COLUMNS] += words[rows * _COLUMNS :]
    rest = int.from_bytes(data[words.size * 8 :].tobytes(), "little")
    return _signed(int(np.dot(columns, _FACTORS)) + rest * int(_FACTORS[-1]))


def partial_checksum(tensor: Tensor, index: Tensor, size: int) -> int:
    """What some elements of a contiguous tensor add to its `checksum`, modulo 2^64.

    Args:
        tensor: the elements, flat and contiguous.
        index: where each stands in the whole, int64.
        size: number of elements of the whole.
    """
    width = tensor.element_size()
    flat = tensor.detach().cpu().view(torch.uint8).numpy()
    bits = flat.view(f"u{width}").astype(np.uint64)
    if width == 8:
        bits ^= bits >> np.uint64(1)
    place, per_word = index.numpy(), 8 // width
    word = np.where(place < size // per_word * per_word, place // per_word % _COLUMNS, -1)
    shift = (place % per_word * 8 * width).astype(np.uint64)
    return _signed(int(np.dot(bits << shift, _FACTORS.view(np.uint64)[word])))


def _signed(word: int) -> int:
    """A number modulo 2^64, as a signed integer."""
    word %= 2**64
    return word - 2**64 if word >= 2**63 else word
