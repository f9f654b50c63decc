"""Detection of external writes: values that other code wrote into parameters between two steps.

Such writes come from `load_state_dict` of the model, an average that is swapped in, or `.data`. On
a CPU, checksums and versions show which parameters may have changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import devices
from ..weights.checksum import checksum_of
from ..weights.latent import LatentWeights
from ..weights.sums import Leaving, Recorded, Sums, copy_unmodified


class WriteDetector:
    """Names the parameters that may hold other values than the recorded ones.

    On accelerators, reading a checksum would synchronize the host, so all parameters are suspects.

    Attributes:
        loaded: checksums of effective weights in a loaded checkpoint, by position. These values may
            differ in the last bits if they were computed on another device; they are not external
            writes.

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
        self._sums: Sums | None = None

    @property
    def nonfinite(self) -> bool:
        """Whether a recorded value on a CPU may be NaN or infinite."""
        return self._sums is not None and self._sums.nonfinite

    def record(self, weights: LatentWeights, local: Recorded) -> None:
        """Record the present values of the parameters.

        Args:
            weights: the latent weights.
            local: local shards of the parameters.
        """
        self._sums = None if devices.synchronizes(weights.device) else local.sums_of(weights)

    def invalidate(self) -> None:
        """Make all parameters suspects, for a reason that this process alone may know."""
        self._sums = None

    def sums(self, weights: LatentWeights) -> Sums | None:
        """Return the sums of the recorded values, if they alone decide what is suspect."""
        return None if self.loaded or weights.shards is not None else self._sums

    def reading(
        self, weights: LatentWeights, local: Sequence[Tensor], positions: Sequence[int]
    ) -> Recorded:
        """Return parameters for a pass that may find their sums while it reads them.

        Args:
            weights: the latent weights.
            local: local shards of the parameters.
            positions: of those that may become latent weights then.
        """
        sums = self.sums(weights) if positions else None
        return Recorded(local) if sums is None else Leaving(weights, positions, local, sums)

    def suspects(self, weights: LatentWeights, local: Sequence[Tensor]) -> list[int]:
        """Return the positions of parameters to compare; the same on all processes.

        Args:
            weights: the latent weights.
            local: local shards of the parameters; they are not read if their sums are recorded.
        """
        found = list(range(len(local)))
        if not devices.synchronizes(weights.device):
            if self._sums is not None:
                known = local.sums if isinstance(local, Recorded) else None
                if known is None:
                    found = copy_unmodified(weights, [], local, self._sums)
                else:
                    found = known.differ(weights, self._sums)
            found = _on_any(weights, found)
        if self.loaded:
            found = [i for i in found if checksum_of(weights, i, local[i]) != self.loaded.get(i)]
        return found


def _on_any(weights: LatentWeights, positions: list[int]) -> list[int]:
    """Return the positions that any process names, so that all processes act alike."""
    if weights.shards is None:
        return positions
    named = torch.zeros(len(weights.views), dtype=torch.int32)
    named[positions] = 1
    return weights.common(named).nonzero().flatten().tolist()
