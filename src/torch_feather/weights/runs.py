"""Runs: neighbouring weight tensors that one operation on a device covers.

Many small operations are slow on accelerators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .latent import DEVICE_BLOCK, LatentWeights, copy_all


def runs(weights: LatentWeights, which: Sequence[int]) -> list[list[int]]:
    """Return tensors in runs of neighbours, of one tensor or at most `DEVICE_BLOCK` weights.

    Args:
        weights: the latent weights.
        which: positions of weight tensors.

    Example:
        >>> weights = LatentWeights([torch.ones(2), torch.ones(2).half(), torch.ones(3)])
        >>> runs(weights, [0, 1, 2])
        [[0, 2], [1]]
    """
    return weights.constant(("runs", *which), lambda weights: _runs(weights, which))


def _runs(weights: LatentWeights, which: Sequence[int]) -> list[list[int]]:
    found: list[list[int]] = []
    end = length = 0
    for i in sorted(which, key=weights.local_spans.__getitem__):
        (start, stop), size = weights.local_spans[i], weights.views[i].numel()
        same = bool(found) and weights.part_of(i) is weights.part_of(found[-1][0])
        if not same or start != end or length + size > DEVICE_BLOCK:
            found.append([])
            length = 0
        found[-1].append(i)
        end, length = stop, length + size
    return found


def joint(weights: LatentWeights, run: Sequence[int]) -> Tensor:
    """Return the latent weights of a run: flat, or in its shape for a single tensor.

    Example:
        >>> joint(LatentWeights([torch.ones(1, 2), torch.zeros(1)]), [0, 1])
        tensor([1., 1., 0.])
    """
    if len(run) == 1:
        return weights.views[run[0]]
    part = weights.part_of(run[0])
    start, stop = weights.local_spans[run[0]][0], weights.local_spans[run[-1]][1]
    return part.flat[start - part.start : stop - part.start]


def joined(
    weights: LatentWeights, run: Sequence[int], tensors: Sequence[Tensor] | Mapping[int, Tensor]
) -> Tensor:
    """Return the tensors of a run, joined in the layout of `joint`.

    Args:
        weights: the latent weights.
        run: positions of weight tensors.
        tensors: by position, in the shapes of the weight tensors.

    Example:
        >>> weights = LatentWeights([torch.ones(1, 2), torch.zeros(1)])
        >>> joined(weights, [0, 1], [torch.tensor([[5.0, 6.0]]), torch.tensor([7.0])])
        tensor([5., 6., 7.])
    """
    if len(run) == 1:
        return tensors[run[0]]
    out = torch.empty_like(joint(weights, run))
    first = weights.local_spans[run[0]][0]
    layout = [(weights.views[i], weights.local_spans[i][0] - first) for i in run]
    copy_all(
        [out.as_strided(view.shape, view.stride(), start) for view, start in layout],
        [tensors[i] for i in run],
    )
    return out
