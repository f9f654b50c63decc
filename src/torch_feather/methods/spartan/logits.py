"""Logits of soft masks, and sums of these masks at a shift mu.

The sums have four columns: of e and of e (1 - e) over pruned weights, then over kept ones. e is m
for pruned weights and 1 - m for kept ones, which keeps the digits of small values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import devices
from ...threads import for_each, scratch
from ...weights.latent import BLOCK, DEVICE_BLOCK, LatentWeights, flat_bits
from ...weights.overlaps import kept_weights, overlaps_of
from ...weights.ranges import arrays, ranges, wide_array
from ...weights.segments import Segment
from ...weights.spans import Span, spans

SAMPLE = 61
"""On a CPU, a search starts at the solution for every so many weights."""

Function = Callable[..., Tensor]
"""`SoftTopK.logits`."""


class StoredLogits(NamedTuple):
    """The logits of all weights, one flat tensor per segment.

    Example:
        >>> stored = StoredLogits([torch.zeros(2)], [torch.tensor([1.0, -1.0])], torch.ones(1, 2))
        >>> stored.sums(torch.zeros(1))
        tensor([[0.5000, 0.2500, 0.5000, 0.2500]], dtype=torch.float64)
    """

    logits: list[Tensor]
    signs: list[Tensor]
    """1 for pruned weights, -1 for kept ones."""
    counts: Tensor
    """Pruned and kept weights of each segment, float64 of shape (segments, 2)."""

    @classmethod
    def of(
        cls, weights: LatentWeights, segments: Sequence[Segment], function: Function
    ) -> StoredLogits:
        """Return the logits of all weights."""
        logits, signs = [], []
        for j, segment in enumerate(segments):
            first, end = weights.local_range(segment.start, segment.stop)
            sign = torch.empty(end - first, dtype=weights.wide, device=weights.device)
            x = torch.empty_like(sign)
            for a in range(first, end, _block(sign)):
                magnitudes = weights.local_magnitudes(a, min(a + _block(sign), end))
                part = slice(a - first, a - first + magnitudes.numel())
                sign[part].copy_(segment.pruned(magnitudes, a)).mul_(2).sub_(1)
                x[part] = function(magnitudes, j)
            logits.append(x)
            signs.append(sign)
        return cls(logits, signs, _counts(signs))

    def sums(self, mu: Tensor) -> Tensor:
        """Return the sums at mu of each segment, float64 of shape (segments, 4)."""
        return torch.stack([_sums(*one) for one in zip(self.logits, self.signs, mu, strict=True)])


def _counts(signs: Sequence[Tensor]) -> Tensor:
    pruned = torch.stack([(sign > 0).sum() for sign in signs]).double()
    sizes = torch.tensor([sign.numel() for sign in signs], device=pruned.device)
    return torch.stack([pruned, sizes - pruned], 1)


def _sums(x: Tensor, sign: Tensor, mu: Tensor) -> Tensor:
    """Return the sums of one segment, of shape (4,)."""
    total = x.new_zeros(4, dtype=torch.float64)
    for part, s in zip(x.split(_block(x)), sign.split(_block(x)), strict=True):
        e = (part + mu).mul_(s).sigmoid_()
        signed = e * s
        both, difference = e.sum(), signed.sum()
        change, signed_change = both - torch.dot(e, e), difference - torch.dot(e, signed)
        rows = torch.stack([both, change, difference, signed_change]).double()
        total += torch.cat([rows[:2] + rows[2:], rows[:2] - rows[2:]]) / 2
    return total


def _block(flat: Tensor) -> int:
    """Return the number of weights per block."""
    return DEVICE_BLOCK if devices.synchronizes(flat.device) else BLOCK


class KeptLogits:
    """The logits of the kept weights on a CPU; those of the others are computed for each sum.

    All that is done with a range of weights is done while it is in the cache, and no memory of the
    size of the weights is needed.

    Args:
        weights: the latent weights.
        segments: cover all weights once, in their order.
        function: gives the logits.

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([1.0, 2.0])])
        >>> cutoff = Cutoff(torch.tensor(1.0), torch.tensor(1), torch.tensor(1.0))
        >>> kept = KeptLogits(weights, [Segment(0, 2, cutoff)], lambda v, j, **_: v - 1)
        >>> kept.counts
        tensor([[1., 1.]], dtype=torch.float64)
        >>> kept.sums(torch.tensor([0.0]))[0, 0]  # m of the pruned weight
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, weights: LatentWeights, segments: Sequence[Segment], function: Function):
        self._weights, self._function = weights, function
        every: list[Span] = []
        owners: list[int] = []
        for j, segment in enumerate(segments):
            found = list(spans(weights, [segment]))
            every += found
            owners += [j] * len(found)
        overlaps, self._latent = overlaps_of(weights, every), arrays(weights, weights.views)
        # A range is within one tensor, and a tensor within one segment.
        self._segment = [owners[own[0].number] for own in overlaps]
        self._segments = len(segments)

        def keep(j: int) -> tuple[np.ndarray, Tensor]:
            at, values = kept_weights(overlaps[j], self._wide(j))
            magnitudes = torch.from_numpy(np.abs(values))
            return at, function(magnitudes, self._segment[j])

        self._kept = for_each(keep, range(len(overlaps)))
        sizes = [(n - at.size, at.size) for n, (at, _) in zip(self._sizes, self._kept, strict=True)]
        self.counts = self._totals(sizes)

    @property
    def _sizes(self) -> list[int]:
        found: list[int] = ranges(self._weights).size.tolist()
        return found

    def _wide(self, j: int) -> np.ndarray:
        """Return the weights of range j in type `wide`."""
        dtype = self._weights.views[ranges(self._weights).position[j]].dtype
        return wide_array(self._latent[j], dtype, self._weights.wide)

    def _totals(self, rows: Sequence[Sequence[float]]) -> Tensor:
        """Return the sums over the ranges of each segment, from a row per range."""
        columns = np.array(rows, np.float64).T
        totals = [np.bincount(self._segment, column, self._segments) for column in columns]
        return torch.from_numpy(np.stack(totals, 1))

    def sample(self) -> StoredLogits:
        """Return every `SAMPLE`-th logit."""
        magnitudes: list[list[np.ndarray]] = [[] for _ in range(self._segments)]
        signs: list[list[np.ndarray]] = [[] for _ in range(self._segments)]
        for j, (at, _) in enumerate(self._kept):
            values = np.abs(self._wide(j)[::SAMPLE])
            sign = np.ones_like(values)
            sign[at[at % SAMPLE == 0] // SAMPLE] = -1
            magnitudes[self._segment[j]].append(values)
            signs[self._segment[j]].append(sign)
        none = torch.empty(0, dtype=self._weights.wide).numpy()
        joined = [torch.from_numpy(np.concatenate([none, *parts])) for parts in magnitudes]
        logits = [self._function(values, j) for j, values in enumerate(joined)]
        joined = [torch.from_numpy(np.concatenate([none, *parts])) for parts in signs]
        return StoredLogits(logits, joined, _counts(joined))

    def sums(self, mu: Tensor) -> Tensor:
        """Return the sums at mu of each segment, float64 of shape (segments, 4)."""

        def of_range(j: int) -> tuple[float, ...]:
            (at, kept), own = self._kept[j], self._segment[j]
            w = self._wide(j)
            e = torch.from_numpy(np.abs(w, out=scratch("values", w.size, w.dtype)))
            e = self._function(e, own, finite=True, out=e).add_(mu[own]).sigmoid_()
            e.numpy()[at.astype(np.intp)] = 0
            rest = (kept + mu[own]).neg_().sigmoid_()
            found: list[float] = []
            for x in (e, rest):
                total = float(x.sum())
                found += [total, total - float(torch.dot(x, x))]
            return tuple(found)

        return self._totals(for_each(of_range, range(len(self._kept))))

    def write_masks(self, mu: Tensor, out: Sequence[Tensor]) -> None:
        """Write m of kept weights, and 0 elsewhere.

        Args:
            mu: of each segment.
            out: tensors of type `wide` in the layout of the weights.
        """
        flat = [flat_bits(mask) for mask in out]
        found = ranges(self._weights)

        def write(j: int) -> None:
            at, kept = self._kept[j]
            part = flat[found.position[j]][found.start[j] :][: found.size[j]]
            part.fill(0)
            part[at.astype(np.intp)] = flat_bits((kept + mu[self._segment[j]]).sigmoid_())

        for_each(write, range(len(self._kept)))
