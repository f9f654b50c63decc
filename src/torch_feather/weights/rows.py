"""Sums over rows of weight tensors, and factors for rows; a row is an entry of dimension 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import devices
from ..selection.cpu import magnitude_bits
from ..threads import for_each, scratch
from .candidates import MOST, choose
from .latent import LatentWeights
from .overlaps import kept_mask, overlaps_of
from .ranges import arrays, ranges, wide_array
from .segments import Segment
from .spans import spans

NO_FACTORS: Mapping[int, Tensor] = MappingProxyType({})


def has_rows(weights: LatentWeights, i: int) -> bool:
    """Return whether the local rows of tensor i lie one after the other in memory.

    Example:
        >>> w = torch.ones(2, 3)
        >>> has_rows(LatentWeights([w]), 0), has_rows(LatentWeights([w.t()]), 0)
        (True, False)
    """
    view = weights.views[i]
    return view.numel() > 0 and view.stride(0) == view.numel() // len(view)


def row_sums(
    weights: LatentWeights, segments: Sequence[Segment], positions: Sequence[int]
) -> list[Tensor]:
    """Return the sum of |w| over the kept weights, and over all weights, of each local row.

    Args:
        weights: the latent weights, on a CPU.
        segments: cover all weights once.
        positions: positions of weight tensors that `has_rows`.

    Returns:
        Tensors of shape (rows, 2) of type `wide`.

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([[1.0, -2.0], [3.0, 4.0]])])
        >>> cutoff = Cutoff(torch.tensor(2.0), torch.tensor(1), torch.tensor(1.9))
        >>> row_sums(weights, [Segment(0, 4, cutoff)], [0])[0]
        tensor([[0., 3.],
                [7., 7.]])
    """
    assert not devices.synchronizes(weights.device)
    out = {i: np.zeros((len(weights.views[i]), 2)) for i in positions}
    found, latent = ranges(weights), arrays(weights, weights.views)
    every = overlaps_of(weights, list(spans(weights, segments)))
    tasks = [(j, i) for j, i in enumerate(found.position.tolist()) if i in out]

    def add(task: tuple[int, int]) -> tuple[int, np.ndarray]:
        j, i = task
        w, start = wide_array(latent[j], weights.views[i].dtype, weights.wide), int(found.start[j])
        width = weights.views[i].numel() // len(weights.views[i])
        first, last = start // width, (start + w.size - 1) // width
        begins = np.maximum(np.arange(first, last + 1) * width - start, 0)
        sums = np.zeros((len(begins), 2))
        magnitudes = np.abs(w, out=scratch("magnitudes", w.size, w.dtype))
        sums[:, 1] = np.add.reduceat(magnitudes, begins)
        if all(overlap.span.limit < 0 for overlap in every[j]):  # all weights are kept
            sums[:, 0] = sums[:, 1]
            return first, sums
        candidates = every[j][0].candidates
        if candidates is None:
            mask = kept_mask(every[j], w)
            count = int(np.count_nonzero(mask))
            if count > MOST * w.size:
                sums[:, 0] = np.add.reduceat(np.multiply(magnitudes, mask, out=magnitudes), begins)
                return first, sums
            at, values = choose(w, mask, count)
        else:
            at, values = candidates.at, candidates.of(w)
            span = every[j][0].span
            values = np.where(magnitude_bits(values, span.piece.scale) > span.limit, values, 0)
        # Candidates that are pruned add 0, so the bits are those without candidates.
        sums[:, 0] = np.bincount(row_of(at, start, width) - first, np.abs(values), len(begins))
        return first, sums

    with np.errstate(all="ignore"):
        for (_, i), (first, sums) in zip(tasks, for_each(add, tasks), strict=True):
            out[i][first : first + len(sums)] += sums
    return [torch.from_numpy(out[i]).to(weights.wide) for i in positions]


def row_of(at: np.ndarray, start: int, width: int) -> np.ndarray:
    """Return the rows of values.

    Args:
        at: positions of the values in a part of the tensor.
        start: position of this part in the tensor.
        width: values in a row.

    Example:
        >>> row_of(np.uint16([0, 1]), 3, 4).tolist()
        [0, 1]
    """
    return (at + np.int64(start)) // width


class RowFactors(NamedTuple):
    """Factors for the rows of a tensor, and where a part of its values lies in it.

    Example:
        >>> RowFactors(torch.tensor([2.0, 3.0]), width=4, start=3).of(np.uint16([0, 1])).tolist()
        [2.0, 3.0]
    """

    factors: Tensor
    width: int
    """Values in a row."""
    start: int
    """Position of the first value of the part."""

    def of(self, at: np.ndarray) -> np.ndarray:
        """Return the factors of values, given their positions in the part."""
        return self.factors.numpy().take(row_of(at, self.start, self.width))

    def multiply(self, part: Tensor) -> None:
        """Multiply all values of the part, flat, in place."""
        multiply_rows(part, self.start, self.width, self.factors)


def multiply_rows(part: Tensor, start: int, width: int, factors: Tensor) -> None:
    """Multiply a part of a tensor by the factors of its rows, in place.

    Args:
        part: consecutive values in the order of memory, flat.
        start: index of the first of them in the tensor.
        width: values in a row.
        factors: one for each row of the tensor.

    Example:
        >>> part = torch.ones(3)  # the last three of four values
        >>> multiply_rows(part, 1, 2, torch.tensor([2.0, 3.0]))
        >>> part
        tensor([2., 3., 3.])
    """
    stop = start + part.numel()
    head = min(-start % width, part.numel())
    tail = max(stop // width * width - start, head)
    for a, b in ((0, head), (head, tail), (tail, part.numel())):
        if a < b:
            row = (start + a) // width
            own = factors[row : row + max((b - a) // width, 1)]
            values = part[a:b].view(len(own), -1)
            if part.element_size() > 2:  # within a pass of several threads, faster than PyTorch
                array = values.numpy()
                with np.errstate(all="ignore"):
                    np.multiply(array, own.numpy()[:, None], out=array, casting="same_kind")
            else:
                values.mul_(own[:, None])
