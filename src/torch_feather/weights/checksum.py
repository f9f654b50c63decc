"""Checksums of weights, the same however a weight is sharded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

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


ROW_BYTES = 8 * COLUMNS
_ROWS = 64  # rows at a time: they stay in the cache while they are read twice


class Sums(NamedTuple):
    """Sums over a range of a tensor's memory that begins at a row.

    Example:
        >>> sums = Sums.of(torch.tensor([1.0, torch.nan]))
        >>> sums.nonfinite, sums.checksum == checksum(torch.tensor([1.0, torch.nan]))
        (True, True)
    """

    columns: np.ndarray
    """int64 of shape (COLUMNS,)."""
    rest: int
    """The bytes of an incomplete last word; only the end of a tensor has one."""
    nonfinite: bool
    """Whether a value may be NaN or infinite. In half precision, a large sum gives True too."""

    @classmethod
    def of(cls, flat: Tensor, check: bool = True) -> Sums:
        """Return the sums over a range.

        Args:
            flat: values on a CPU, flat and contiguous.
            check: whether to look for NaN and infinity; `nonfinite` is False otherwise.
        """
        data, width = flat.view(torch.uint8).numpy(), flat.element_size()
        words = data[: data.size // 8 * 8].view(np.int64)
        columns, nonfinite, start = np.zeros(COLUMNS, np.int64), False, 0
        if flat.dtype == torch.float32 and compiled.kernels() is not None:
            start = words.size
            nonfinite = compiled.scan(words, columns)
        for a in range(start, words.size, _ROWS * COLUMNS):
            block = words[a : a + _ROWS * COLUMNS]
            if check:
                nonfinite |= _may_be_nonfinite(flat[a * 8 // width : (a + block.size) * 8 // width])
            if width == 8:
                # Sign bits would be the topmost bits, and an even number of them cancels: mix them
                # in.
                block = block ^ (block.view(np.uint64) >> 1).view(np.int64)
            full = block.size // COLUMNS * COLUMNS
            if full:
                columns += np.add.reduce(block[:full].reshape(-1, COLUMNS), axis=0)
            columns[: block.size - full] += block[full:]
        rest = data[words.size * 8 :]
        if check and rest.size:
            nonfinite |= _may_be_nonfinite(flat[words.size * 8 // width :])
        return cls(columns, int.from_bytes(rest.tobytes(), "little"), nonfinite)

    @property
    def checksum(self) -> int:
        """The `checksum` of a tensor, from the sums over all of it."""
        return _signed(int(np.dot(self.columns, _FACTORS)) + self.rest * int(_FACTORS[-1]))


def joined(parts: Sequence[Sums]) -> Sums:
    """Return the sums over all of a tensor, from those over its ranges.

    Example:
        >>> w = torch.ones(2 * ROW_BYTES)
        >>> parts = [Sums.of(w[:ROW_BYTES]), Sums.of(w[ROW_BYTES:])]
        >>> joined(parts).checksum == checksum(w)
        True
    """
    columns = np.sum([part.columns for part in parts], axis=0)
    return Sums(columns, sum(part.rest for part in parts), any(part.nonfinite for part in parts))


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
    return tensor_sums(tensor, check=False).checksum


def tensor_sums(tensor: Tensor, check: bool = True) -> Sums:
    """Return the sums over all of a tensor, computed by several threads.

    Args:
        tensor: dense in memory, on any device.
        check: whether to look for NaN and infinity.

    Example:
        >>> tensor_sums(torch.tensor([[1.0, 2.0]])).nonfinite
        False
    """
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).cpu()
    step = 4 * _ROWS * ROW_BYTES // flat.element_size()
    if flat.numel() <= step:
        return Sums.of(flat, check)
    starts = range(0, flat.numel(), step)
    return joined(for_each(lambda a: Sums.of(flat[a : a + step], check), starts))


def _may_be_nonfinite(flat: Tensor) -> bool:
    """Return whether a value may be NaN or infinite."""
    if flat.numel() == 0:
        return False
    if flat.element_size() == 2:  # NumPy has no bfloat16, and float16 is slow there
        return not bool(flat.sum(dtype=torch.float32).isfinite())
    values = flat.numpy()
    return not np.isfinite(np.maximum.reduce(values) - np.minimum.reduce(values))


class Recorded(list[Tensor]):
    """Tensors to write, with the checksums that were computed while they were in the cache.

    Attributes:
        sums: by position, and the version of the tensor at which they hold.

    Example:
        >>> w = torch.ones(2)
        >>> recorded = Recorded([w])
        >>> recorded.sums[0] = w._version, Sums.of(w)
        >>> _ = w.zero_()
        >>> recorded.sums_of(0).checksum == checksum(w)  # computed again
        True
    """

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__(tensors)
        self.sums: dict[int, tuple[int, Sums]] = {}

    def sums_of(self, i: int) -> Sums:
        """Return the sums over a tensor."""
        version, sums = self.sums.get(i, (None, None))
        if sums is None or version != self[i]._version:
            return tensor_sums(self[i])
        return sums


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
