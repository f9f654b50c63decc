"""The standard deviation of each weight tensor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import devices
from ..threads import scratch
from .checksum import dot
from .latent import LatentWeights, sum_blocks
from .ranges import of_ranges, ranges


def standard_deviations(weights: LatentWeights) -> Tensor:
    """Return the standard deviation of each weight tensor; 0 for a single weight.

    Args:
        weights: the latent weights; sharded ones count as a whole.

    Example:
        >>> standard_deviations(LatentWeights([torch.tensor([-1.0, 1.0]), torch.ones(1)]))
        tensor([1.4142, 0.0000])
    """
    wide = weights.wide
    if weights.shards is None:
        if not devices.synchronizes(weights.device):
            return _on_cpu(weights)
        every = (w.to(wide) for w in weights.views)
        return torch.stack([w.std() if w.numel() > 1 else w.new_zeros(()) for w in every])
    means = weights.total(torch.stack([w.sum(dtype=wide) for w in weights.views])) / weights.sizes
    pairs = zip(weights.views, means, strict=True)
    squares = weights.total(torch.stack([_square_distance(w, mean) for w, mean in pairs]))
    return (squares / (weights.sizes - 1).clamp_min(1)).sqrt()


def _square_distance(w: Tensor, mean: Tensor) -> Tensor:
    """Return the sum of (w - mean)^2 in the type of the mean, 0-dimensional."""
    return sum_blocks(lambda block: (block.to(mean.dtype) - mean).square_().sum(), w)


def _on_cpu(weights: LatentWeights) -> Tensor:
    """Return the standard deviations with one read of the weights.

    The squares of each range are summed around the mean of the range, and moved to that of the
    tensor. Around 0 they need no copy, but lose digits if the mean is large.
    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for
    computing sample variances (1979).
    """

    def moments(w: np.ndarray) -> tuple[float, float]:
        with np.errstate(all="ignore"):
            mean, squares = float(np.add.reduce(w)) / w.size, dot(w, w)
            around_mean = squares - w.size * mean * mean
            if around_mean > squares / 2:
                return mean, around_mean
            mean = float(w.dtype.type(mean))
            rest = np.subtract(w, mean, out=scratch("values", w.size, w.dtype))
            more = float(np.add.reduce(rest)) / w.size  # the mean was rounded
            return mean + more, max(dot(rest, rest) - w.size * more * more, 0.0)

    with np.errstate(all="ignore"):
        mean, squares = np.array(of_ranges(weights, moments)).reshape(-1, 2).T
        position, own, tensors = ranges(weights).position, ranges(weights).size, len(weights.views)
        sizes = np.bincount(position, own, tensors)
        of_tensor = np.bincount(position, mean * own, tensors) / np.maximum(sizes, 1)
        squares = squares + own * (mean - of_tensor[position]) ** 2
        total = np.bincount(position, squares, tensors)
        return torch.from_numpy(np.sqrt(total / np.maximum(sizes - 1, 1))).to(weights.wide)
