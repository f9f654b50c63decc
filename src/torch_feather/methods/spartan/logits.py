"""Logits of soft masks, and sums of these masks at a shift mu.

The sums have four columns: of e and of e (1 - e) over pruned weights, then over kept ones. e is m
for pruned weights and 1 - m for kept ones, which keeps the digits of small values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import devices
from ...threads import for_each, scratch
from ...weights.latent import BLOCK, DEVICE_BLOCK, LatentWeights
from ...weights.overlaps import kept_weights, overlaps_of
from ...weights.ranges import arrays, ranges, wide_array
from ...weights.segments import Segment
from ...weights.spans import spans

SAMPLE = 61
"""On a CPU, a search starts near the solution for every so many weights."""
SATURATED = 100.0
"""Logit of NaN values, at which m is 1 for every possible mu."""

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


class Line(NamedTuple):
    """The logits of a segment on a CPU, beta (v / c - h) + mu, by numbers of the host.

    Example:
        >>> line = Line(beta=2.0, scale=1.0, threshold=0.5)
        >>> line.write(np.float32([1.0]), np.empty(1, np.float32))
        array([1.], dtype=float32)
    """

    beta: float
    scale: float
    """1 / c."""
    threshold: float
    """h."""
    shift: float = 0.0
    """mu."""

    def write(self, values: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Write and return the logits of values v >= 0; those of NaN are NaN."""
        with np.errstate(all="ignore"):
            if self.scale != 1:
                values = np.multiply(values, self.scale, out=out)
            np.subtract(values, self.threshold, out=out)
            np.multiply(out, self.beta, out=out)
            return np.add(out, self.shift, out=out) if self.shift else out

    def mask(self, values: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Write and return m of values v >= 0; 1 for NaN.

        The result for a value does not depend on the other values.
        """
        m = sigmoid_(self.write(values, out))
        if np.isnan(np.add.reduce(m, axis=None)):
            m[np.isnan(m)] = 1
        return m

    def mask_(self, values: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Write and return m of values v >= 0; NaN for NaN.

        The last bits depend on the position in the array, as PyTorch computes the last values,
        which fill no vector, in another way. It takes two thirds of the time of `mask`.
        """
        torch.from_numpy(self.write(values, out)).sigmoid_()
        return out


def sigmoid_(x: np.ndarray) -> np.ndarray:
    """Write and return the sigmoid of numbers in their memory.

    A result does not depend on the other numbers, as it does with PyTorch.

    Args:
        x: float32 or float64.

    Example:
        >>> sigmoid_(np.float32([0.0, -200.0, 200.0]))
        array([0.5, 0. , 1. ], dtype=float32)
    """
    with np.errstate(all="ignore"):
        np.exp(np.negative(x, out=x), out=x)
        np.add(x, 1, out=x)
        return np.reciprocal(x, out=x)


class KeptLogits:
    """The logits of the kept weights on a CPU; those of the others are computed for each sum.

    All that is done with a range of weights is done while it is in the cache, and no memory of the
    size of the weights is needed.

    Args:
        weights: the latent weights.
        segments: cover all weights once, in their order.
        lines: their logits.

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([1.0, 2.0])])
        >>> cutoff = Cutoff(torch.tensor(1.0), torch.tensor(1), torch.tensor(1.0))
        >>> kept = KeptLogits(weights, [Segment(0, 2, cutoff)], [Line(1.0, 1.0, 1.0)])
        >>> kept.counts
        tensor([[1., 1.]], dtype=torch.float64)
        >>> kept.sums(torch.tensor([0.0]))[0, 0]  # m of the pruned weight
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, weights: LatentWeights, segments: Sequence[Segment], lines: Sequence[Line]):
        self._weights, self._lines = weights, lines
        overlaps = overlaps_of(weights, list(spans(weights, segments)))
        self._latent = arrays(weights, weights.views)
        # A range is within one tensor, and a tensor within one segment.
        self._segment = [own[0].span.segment for own in overlaps]
        found = for_each(lambda j: kept_weights(overlaps[j], self._wide(j)), range(len(overlaps)))
        self._at = [at for at, _ in found]
        kept = np.array([at.size for at in self._at], np.int64)
        sizes = np.array([ranges(weights).size - kept, kept], np.float64)
        self.counts = self._totals(self._segment, sizes.T)
        # In the order of the weights, so those of a segment are neighbours.
        self._kept = np.abs(np.concatenate([_none(weights), *(w for _, w in found)]))
        self._parts: list[tuple[int, slice]] = []
        ends = np.cumsum(self.counts[:, 1].numpy()).astype(int).tolist()
        for own, (start, stop) in enumerate(pairwise([0, *ends])):
            for a in range(start, stop, BLOCK):
                part = slice(a, min(a + BLOCK, stop))
                x = lines[own].write(self._kept[part], self._kept[part])
                torch.from_numpy(x).nan_to_num_(nan=SATURATED)
                self._parts.append((own, part))

    def _wide(self, j: int) -> np.ndarray:
        """Return the weights of range j in type `wide`."""
        dtype = self._weights.views[ranges(self._weights).position[j]].dtype
        return wide_array(self._latent[j], dtype, self._weights.wide)

    def _totals(
        self, owners: Sequence[int], rows: Sequence[Sequence[float]] | np.ndarray
    ) -> Tensor:
        """Return the sums of rows of numbers that belong to each segment."""
        columns = np.array(rows, np.float64).reshape(-1, 2).T
        totals = [np.bincount(owners, column, len(self._lines)) for column in columns]
        return torch.from_numpy(np.stack(totals, 1))

    def sample(self) -> StoredLogits:
        """Return every `SAMPLE`-th logit."""
        count, none = len(self._lines), _none(self._weights)
        values: list[list[np.ndarray]] = [[none] for _ in range(count)]
        signs: list[list[np.ndarray]] = [[none] for _ in range(count)]
        for j, at in enumerate(self._at):
            sampled = np.abs(self._wide(j)[::SAMPLE])
            sign = np.ones_like(sampled)
            sign[at[at % SAMPLE == 0] // SAMPLE] = -1
            values[self._segment[j]].append(sampled)
            signs[self._segment[j]].append(sign)
        joined = [np.concatenate(parts) for parts in values]
        logits = [
            torch.from_numpy(line.write(v, v)).nan_to_num_(nan=SATURATED)
            for line, v in zip(self._lines, joined, strict=True)
        ]
        signed = [torch.from_numpy(np.concatenate(parts)) for parts in signs]
        return StoredLogits(logits, signed, _counts(signed))

    def sums(self, mu: Tensor) -> Tensor:
        """Return the sums at mu of each segment, float64 of shape (segments, 4)."""
        pairs = zip(self._lines, mu.tolist(), strict=True)
        lines = [line._replace(shift=shift) for line, shift in pairs]

        def of_pruned(j: int) -> tuple[float, float]:
            w = self._wide(j)
            e = np.abs(w, out=scratch("values", w.size, w.dtype))
            lines[self._segment[j]].mask_(e, e)
            e[self._at[j].astype(np.intp)] = 0
            return _moments(e)

        def of_kept(task: tuple[int, slice]) -> tuple[float, float]:
            own, part = task
            x = self._kept[part]
            e = np.add(x, lines[own].shift, out=scratch("values", x.size, x.dtype))
            torch.from_numpy(np.negative(e, out=e)).sigmoid_()
            return _moments(e)

        pruned = self._totals(self._segment, for_each(of_pruned, range(len(self._at))))
        owners = [own for own, _ in self._parts]
        return torch.cat([pruned, self._totals(owners, for_each(of_kept, self._parts))], 1)


def _none(weights: LatentWeights) -> np.ndarray:
    """Return no values of type `wide`."""
    return torch.empty(0, dtype=weights.wide).numpy()


def _moments(e: np.ndarray) -> tuple[float, float]:
    """Return the sums of e and of e (1 - e)."""
    values = torch.from_numpy(e)
    total = float(values.sum())
    return total, total - float(torch.dot(values, values))
