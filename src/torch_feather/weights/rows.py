"""Sums over rows of weight tensors, and factors for rows; a row is an entry of dimension 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from .. import devices
from ..selection.cpu import INTEGER, magnitude_bits
from ..threads import for_each, scratch
from .latent import BLOCK, LatentWeights, flat_of
from .scores import as_array
from .segments import Segment, segment_of
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


def row_sums(weights: LatentWeights, segments: Sequence[Segment], i: int) -> Tensor:
    """Return the sum of |w| over the kept weights, and over all weights, of each local row.

    Args:
        weights: the latent weights, on a CPU.
        segments: cover all weights once.
        i: position of a weight tensor that `has_rows`.

    Returns:
        A tensor of shape (rows, 2) of type `wide`.

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([[1.0, -2.0], [3.0, 4.0]])])
        >>> cutoff = Cutoff(torch.tensor(2.0), torch.tensor(1), torch.tensor(1.9))
        >>> row_sums(weights, [Segment(0, 4, cutoff)], 0)
        tensor([[0., 3.],
                [7., 7.]])
    """
    assert not devices.synchronizes(weights.device)
    first, end = weights.local_spans[i]
    rows, flat = len(weights.views[i]), flat_of(weights.views[i])
    width, number = (
        (end - first) // rows,
        np.float64 if weights.wide == torch.float64 else np.float32,
    )
    limits = [
        (span.piece.start - first, span.piece.values.numel(), span.limit, span.piece.scale)
        for span in spans(weights, [segment_of(weights, segments, i)])
        if span.piece.start < end and span.piece.start + span.piece.values.numel() > first
    ]
    out = torch.empty(rows, 2, dtype=weights.wide)

    def add(start: int) -> None:
        stop = min(start + step, rows)
        w = as_array(flat[start * width : stop * width], weights.wide)
        magnitudes = np.abs(w, out=scratch("magnitudes", w.size, number))
        rows_of = torch.from_numpy(magnitudes).view(-1, width)
        out[start:stop, 1] = rows_of.sum(1)
        for begin, size, limit, scale in limits:
            a = max(begin - start * width, 0)
            b = min(begin + size - start * width, w.size)
            if a < b:
                bits = magnitude_bits(w[a:b], scale)
                # All bits are set if the score is above the limit.
                mask = np.subtract(bits.dtype.type(limit), bits, out=bits)
                mask >>= 8 * bits.itemsize - 1
                magnitudes.view(INTEGER[magnitudes.dtype])[a:b] &= mask
        out[start:stop, 0] = rows_of.sum(1)

    step = max(BLOCK // width, 1)
    for_each(add, range(0, rows, step))
    return out


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
