"""Masks and counts of pruned weights on a CPU, block by block in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..selection.cpu import magnitude_bits
from ..threads import for_each
from .latent import BLOCK, LatentWeights
from .scores import as_array
from .segments import Segment, segment_of
from .spans import Span, spans


def pruned_mask(weights: LatentWeights, segment: Segment, i: int) -> Tensor:
    """Return the mask of pruned weights of tensor i, computed block by block.

    Args:
        weights: the latent weights, on the CPU.
        segment: the segment that holds the tensor.
        i: position of the weight tensor.

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([1.0, 1.0, 2.0])])
        >>> cutoff = Cutoff(torch.tensor(1.0), torch.tensor(0), torch.tensor(0.9))
        >>> pruned_mask(weights, Segment(0, 3, cutoff), 0)
        tensor([ True, False, False])
    """
    first, end = weights.local_spans[i]
    flat = torch.empty(end - first, dtype=torch.bool)
    out = flat.numpy()

    def compare(block: tuple[Span, int, int]) -> None:
        span, a, b = block
        np.less_equal(_bits(weights, span, a, b), span.limit, out=out[a - first : b - first])

    for_each(compare, _blocks(weights, segment, i))
    return flat.as_strided(weights.views[i].shape, weights.views[i].stride())


def count_pruned(weights: LatentWeights, segments: Sequence[Segment], i: int) -> int:
    """Return the number of pruned local weights of tensor i, without a mask.

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([1.0, 1.0, 2.0])])
        >>> cutoff = Cutoff(torch.tensor(1.0), torch.tensor(0), torch.tensor(0.9))
        >>> count_pruned(weights, [Segment(0, 3, cutoff)], 0)
        1
    """

    def count(block: tuple[Span, int, int]) -> int:
        return int(np.count_nonzero(_bits(weights, *block) <= block[0].limit))

    return sum(for_each(count, _blocks(weights, segment_of(weights, segments, i), i)))


def _blocks(weights: LatentWeights, segment: Segment, i: int) -> list[tuple[Span, int, int]]:
    """Return the blocks of local weights of tensor i: their span, start and stop."""
    first, end = weights.local_spans[i]
    found = []
    for span in spans(weights, [segment]):
        start = max(first, span.piece.start)
        stop = min(end, span.piece.start + span.piece.values.numel())
        found += [(span, a, min(a + BLOCK, stop)) for a in range(start, stop, BLOCK)]
    return found


def _bits(weights: LatentWeights, span: Span, a: int, b: int) -> np.ndarray:
    """Return the bits of the scores of local weights a to b, in memory of this thread."""
    w = as_array(span.piece.values[a - span.piece.start : b - span.piece.start], weights.wide)
    return magnitude_bits(w, span.piece.scale)
