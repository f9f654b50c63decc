"""Detection of external writes: values that other code wrote into parameters between two steps.

Such writes come from `load_state_dict` of the model, an average that is swapped in, or `.data`. On
a CPU, checksums and versions show which parameters may have changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import devices
from ..weights.checksum import Recorded, checksum, checksum_of
from ..weights.latent import LatentWeights


class WriteDetector:
    """Names the parameters that may hold other values than the recorded ones.

    On accelerators, reading a checksum would synchronize the host, so all parameters are suspects.

    Attributes:
        loaded: checksums of effective weights in a loaded checkpoint, by position. These values may
            differ in the last bits if they were computed on another device; they are not external
            writes.
        nonfinite: whether a recorded value on a CPU may be NaN or infinite.

    Example:
        >>> w = torch.ones(2)
        >>> weights, detector = LatentWeights([w]), WriteDetector()
        >>> detector.record(weights, Recorded([w]))
        >>> detector.suspects(weights, [w])
        []
        >>> _ = w.zero_()
        >>> detector.suspects(weights, [w])
        [0]
    """

    def __init__(self) -> None:
        self.loaded: dict[int, int] = {}
        self._marks: list[tuple[int, int]] = []
        self.nonfinite = False

    def record(self, weights: LatentWeights, local: Recorded) -> None:
        """Record the present values of the parameters.

        Args:
            weights: the latent weights.
            local: local shards of the parameters.
        """
        self._marks, self.nonfinite = [], False
        if not devices.synchronizes(weights.device):
            sums = [local.sums_of(i) for i in range(len(local))]
            versions = [part._version for part in local]
            self._marks = [(v, one.checksum) for v, one in zip(versions, sums, strict=True)]
            self.nonfinite = any(one.nonfinite for one in sums)

    def invalidate(self) -> None:
        """Make all parameters suspects, for a reason that this process alone may know."""
        self._marks = []

    def suspects(self, weights: LatentWeights, local: Sequence[Tensor]) -> list[int]:
        """Return the positions of parameters to compare; the same on all processes."""
        found = list(range(len(local)))
        if not devices.synchronizes(weights.device):
            pairs = enumerate(zip(_marks(local), self._marks, strict=True))
            named = [i for i, (now, then) in pairs if now != then] if self._marks else found
            found = _on_any(weights, named)
        if self.loaded:
            found = [i for i in found if checksum_of(weights, i, local[i]) != self.loaded.get(i)]
        return found


def _marks(local: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return version and checksum of each tensor; every write changes one of them."""
    return [(part._version, checksum(part)) for part in local]


def _on_any(weights: LatentWeights, positions: list[int]) -> list[int]:
    """Return the positions that any process names, so that all processes act alike."""
    if weights.shards is None:
        return positions
    named = torch.zeros(len(weights.views), dtype=torch.int32)
    named[positions] = 1
    return weights.common(named).nonzero().flatten().tolist()
