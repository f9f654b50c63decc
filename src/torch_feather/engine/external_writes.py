"""What others write into parameters between steps: checksums that tell, and when to look closer.

Writes may come from anywhere (`load_state_dict` of the model, an average swapped in, `.data`), so
they are looked for: parameters are compared with what the engine gave them last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import devices
from ..weights.checksum import checksum, checksum_of
from ..weights.latent import LatentWeights


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
        self._marks = [] if devices.synchronizes(weights.device) else _marks(here)

    def doubt(self) -> None:
        """All processes are to look closer next time; this one alone knows why."""
        self._marks = []

    def suspects(self, weights: LatentWeights, here: Sequence[Tensor]) -> list[int]:
        """Which of the parameters to compare with what they were given; alike on all processes."""
        found = list(range(len(here)))
        if not devices.synchronizes(weights.device):
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
