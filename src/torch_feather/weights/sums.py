"""Sums of what was written into parameters, by which later writes of other code are noticed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..threads import for_each
from . import compiled
from .checksum import checksum_of_rows, may_be_nonfinite
from .latent import LatentWeights
from .ranges import arrays, ranges


class Sums(NamedTuple):
    """Versions of tensors, and the checksum of each of their `ranges`.

    Example:
        >>> w = torch.tensor([1.0, torch.inf])
        >>> sums = sum_ranges(LatentWeights([w]), [w])
        >>> sums.checksums.shape, sums.nonfinite
        ((1,), True)
    """

    versions: list[int]
    checksums: np.ndarray
    """int64 of shape (ranges,); the sum over a tensor is its `checksum`."""
    nonfinite: bool
    """Whether a value may be NaN or infinite."""

    def checksum(self, weights: LatentWeights, i: int) -> int:
        """Return the `checksum` of tensor i."""
        return int(self.checksums[ranges(weights).position == i].sum())

    def differ(self, weights: LatentWeights, other: Sums) -> list[int]:
        """Return the positions of the tensors of which a version or a sum differs."""
        modified = np.array(self.versions) != other.versions
        differs = self.checksums != other.checksums
        modified[ranges(weights).position[differs]] = True
        return np.flatnonzero(modified).tolist()


class Recorded(list[Tensor]):
    """Tensors to write, with their sums if the pass that writes them computes these.

    Example:
        >>> w = torch.ones(2)
        >>> recorded, weights = Recorded([w]), LatentWeights([w])
        >>> recorded.sums = sum_ranges(weights, recorded)
        >>> _ = w.zero_()
        >>> recorded.sums_of(weights).checksums.tolist()  # computed again
        [0]
    """

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__(tensors)
        self.sums: Sums | None = None

    def sums_of(self, weights: LatentWeights) -> Sums:
        """Return the sums of the present values."""
        if self.sums is not None and self.sums.versions == versions(self):
            return self.sums
        return sum_ranges(weights, self)

    def finish(self) -> dict[int, int]:
        """Return the positions of tensors that hold latent weights now, and their versions."""
        return {}

    def restore(self, effective: Sequence[Tensor]) -> None:
        """Copy effective weights back into tensors that hold latent weights."""


class Leaving(Recorded):
    """Effective weights in parameters that become latent weights while a pass reads them.

    The pass calls `leaves` for each of the `ranges`, and copies those of which it is true. So the
    parameters need no pass of their own before the optimizer's step.

    Args:
        weights: the latent weights, on a CPU.
        positions: of the parameters that become latent weights.
        parameters: a local tensor for each weight tensor.
        sums: of their values when they were written; modified ranges keep their values.

    Example:
        >>> u, weights = torch.zeros(2), LatentWeights([torch.ones(2)])
        >>> leaving = Leaving(weights, [0], [u], sum_ranges(weights, [u]))
        >>> [held], [latent] = arrays(weights, leaving), arrays(weights, weights.views)
        >>> if leaving.leaves(0, checksum_of_rows(held)):
        ...     np.copyto(held, latent)
        >>> u, leaving.finish()
        (tensor([1., 1.]), {0: 1})
    """

    def __init__(
        self,
        weights: LatentWeights,
        positions: Sequence[int],
        parameters: Sequence[Tensor],
        sums: Sums,
    ):
        super().__init__(parameters)
        self._checksums, self._ranges = sums.checksums.tolist(), ranges(weights)
        chosen = np.zeros(len(parameters), bool)
        chosen[list(positions)] = True
        chosen &= np.array(versions(parameters)) == sums.versions
        self._leaves: list[bool] = chosen[self._ranges.position].tolist()
        self._left = np.zeros(len(self._leaves), bool)

    def leaves(self, j: int, checksum: int) -> bool:
        """Return whether a range must become latent weights: not if other code modified it.

        Args:
            j: position of the range.
            checksum: of its present values.
        """
        self._left[j] = self._leaves[j] and checksum == self._checksums[j]
        return bool(self._left[j])

    def restore(self, effective: Sequence[Tensor]) -> None:
        held, given = self._ranges.of(self), self._ranges.of(effective)
        for j in self._left.nonzero()[0].tolist():
            np.copyto(held[j], given[j])
        self._left[:] = False

    def finish(self) -> dict[int, int]:
        holds = np.zeros(len(self), bool)
        holds[self._ranges.position] = True
        holds[self._ranges.position[~self._left]] = False
        left = holds.nonzero()[0].tolist()
        torch.autograd.graph.increment_version([self[i] for i in left])
        return {i: self[i]._version for i in left}


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return the versions of tensors.

    Example:
        >>> w = torch.ones(2)
        >>> before = versions([w])
        >>> _ = w.zero_()
        >>> versions([w]) == before
        False
    """
    return [tensor._version for tensor in tensors]


def sum_ranges(weights: LatentWeights, tensors: Sequence[Tensor]) -> Sums:
    """Return the sums of tensors.

    Args:
        weights: the layout, on a CPU.
        tensors: one local tensor per weight tensor.

    Example:
        >>> w = torch.ones(2)
        >>> sum_ranges(LatentWeights([w]), [w]).nonfinite
        False
    """
    every = ranges(weights)
    rows = compiled.table(weights, tensors)
    if rows is not None:
        compiled.sum_rows(rows)
        return Sums(versions(tensors), rows["checksum"].copy(), bool(rows["flag"].any()))
    dtypes = [tensors[i].dtype for i in every.position.tolist()]

    def add(task: tuple[np.ndarray, torch.dtype]) -> tuple[int, bool]:
        return checksum_of_rows(task[0]), may_be_nonfinite(*task)

    found = for_each(add, list(zip(arrays(weights, tensors), dtypes, strict=True)))
    checksums = np.array([checksum for checksum, _ in found], np.int64)
    return Sums(versions(tensors), checksums, any(odd for _, odd in found))


def copy_unmodified(
    weights: LatentWeights,
    positions: Sequence[int],
    parameters: Sequence[Tensor],
    sums: Sums,
) -> list[int]:
    """Copy latent weights into parameters, except where these were modified.

    A range is copied while it is in the cache for the comparison. If other ranges of a tensor were
    modified, only those keep their values.

    Args:
        weights: the latent weights, on a CPU.
        positions: of the weight tensors to copy; the others are only compared.
        parameters: a local tensor for each weight tensor.
        sums: of their values when they were written.

    Returns:
        The positions of parameters that were modified.

    Example:
        >>> u, weights = torch.zeros(2), LatentWeights([torch.ones(2)])
        >>> sums = sum_ranges(weights, [u])
        >>> copy_unmodified(weights, [0], [u], sums), u
        ([], tensor([1., 1.]))
        >>> copy_unmodified(weights, [0], [u], sums)
        [0]
    """
    modified, copied = (np.zeros(len(parameters), bool) for _ in range(2))
    now = versions(parameters)
    if now != sums.versions:
        modified[:] = [a != b for a, b in zip(now, sums.versions, strict=True)]
    copied[list(positions)] = True
    copied &= ~modified
    every = ranges(weights)
    rows = compiled.table(weights, parameters)
    if rows is not None:
        if not copied.all():
            rows["latent"][~copied[every.position]] = 0
        rows["checksum"] = sums.checksums
        compiled.leave(rows)
        differs = rows["flag"] != 0
    else:
        differs = _copy_unmodified(weights, parameters, sums, copied)
    modified[every.position[differs]] = True
    torch.autograd.graph.increment_version([parameters[i] for i in np.flatnonzero(copied).tolist()])
    return np.flatnonzero(modified).tolist()


def _copy_unmodified(
    weights: LatentWeights, parameters: Sequence[Tensor], sums: Sums, copied: np.ndarray
) -> np.ndarray:
    """Copy as `copy_unmodified` with NumPy; return which ranges were modified."""
    every, expected = ranges(weights), sums.checksums.tolist()

    def copy(task: tuple[int, np.ndarray, np.ndarray]) -> bool:
        j, parameter, latent = task
        if checksum_of_rows(parameter) != expected[j]:
            return True
        if copied[every.position[j]]:
            np.copyto(parameter, latent)
        return False

    pairs = zip(arrays(weights, parameters), arrays(weights, weights.views), strict=True)
    return np.array(for_each(copy, [(j, *pair) for j, pair in enumerate(pairs)]), bool)
