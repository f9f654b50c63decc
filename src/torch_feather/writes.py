"""What others write into parameters between steps: checksums that tell, and when to look closer.

Writes may come from anywhere (`load_state_dict` of the model, an average swapped in, `.data`), so
they are looked for: parameters are compared with what the engine gave them last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import host
from .latent import BLOCK, LatentWeights


class Watch:
    """Tells which parameters may hold something else than they were given.

    On CPUs versions and checksums say it. Elsewhere reading them would make the host wait, so there
    all of them may.

    Attributes:
        loaded: checksums, by number, of what a checkpoint says that parameters were given. It may
            be the image that another device has made, so it is no write from outside.
    """

    def __init__(self) -> None:
        self.loaded: dict[int, int] = {}
        self._marks: list[tuple[int, int]] = []

    def note(self, weights: LatentWeights, here: Sequence[Tensor]) -> None:
        """The parameters, of which this is what is here, were given their values just now."""
        self._marks = [] if host.waits_for(weights.device) else _marks(here)

    def doubt(self) -> None:
        """All processes are to look closer next time; this one alone knows why."""
        self._marks = []

    def suspects(self, weights: LatentWeights, here: Sequence[Tensor]) -> list[int]:
        """Which of the parameters to compare with what they were given; alike on all processes."""
        found = list(range(len(here)))
        if not host.waits_for(weights.device):
            pairs = enumerate(zip(_marks(here), self._marks, strict=True))
            named = [i for i, (now, then) in pairs if now != then] if self._marks else found
            found = _on_any(weights, named)
        if self.loaded:
            found = [i for i in found if checksum_of(weights, i, here[i]) != self.loaded.get(i)]
        return found


def _marks(here: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Versions and checksums: one of them changes with every write."""
    return [(part._version, checksum(part)) for part in here]


def _on_any(weights: LatentWeights, indices: list[int]) -> list[int]:
    """The weights that some process names: all must do the same."""
    if weights.shards is None:
        return indices
    named = torch.zeros(len(weights.views), dtype=torch.int32)
    named[indices] = 1
    return weights.common(named).nonzero().flatten().tolist()


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
