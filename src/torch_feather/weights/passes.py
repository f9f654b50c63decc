"""Passes over the weights: masks, effective weights, and external writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .. import devices
from ..operators import Operator
from . import masks, plain, rows, triton_passes
from .kept import kept_values
from .latent import DEVICE_BLOCK, LatentWeights, blocks, copy_all
from .rows import NO_FACTORS
from .runs import joined, joint, runs
from .segments import Segment, segment_of


def pruned_mask(weights: LatentWeights, segments: Sequence[Segment], i: int) -> Tensor:
    """Return the mask of pruned weights of tensor i, in its shape and layout.

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([0.5, -1.0, 2.0])])
        >>> cutoff = Cutoff(torch.tensor(1.0), torch.tensor(2), torch.tensor(1.0))
        >>> pruned_mask(weights, [Segment(0, 3, cutoff)], 0).tolist()
        [True, True, False]
    """
    if not devices.synchronizes(weights.device):
        return masks.pruned_mask(weights, segment_of(weights, segments, i), i)
    start, stop = weights.local_spans[i]
    flat = segment_of(weights, segments, i).pruned(weights.local_magnitudes(start, stop), start)
    return flat.as_strided(weights.views[i].shape, weights.views[i].stride())


def row_sums(
    weights: LatentWeights, segments: Sequence[Segment], positions: Sequence[int]
) -> list[Tensor]:
    """Return the sum of |w| over the kept weights, and over all weights, of each local row.

    Args:
        weights: the latent weights.
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
    if not devices.synchronizes(weights.device):
        return rows.row_sums(weights, segments, positions)
    found = []
    for i in positions:
        magnitudes = weights.views[i].abs().to(weights.wide)
        kept = magnitudes.masked_fill(pruned_mask(weights, segments, i), 0.0)
        found.append(torch.stack([x.flatten(1).sum(1) for x in (kept, magnitudes)], 1))
    return found


def count_pruned(weights: LatentWeights, segments: Sequence[Segment]) -> Tensor:
    """Return the number of pruned weights of each tensor, int64 of shape (tensors,).

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([0.5, -1.0, 2.0])])
        >>> cutoff = Cutoff(torch.tensor(1.0), torch.tensor(2), torch.tensor(1.0))
        >>> count_pruned(weights, [Segment(0, 3, cutoff)]).tolist()
        [2]
    """
    every = range(len(weights.views))
    if devices.synchronizes(weights.device):
        counts = torch.stack([pruned_mask(weights, segments, i).sum() for i in every])
    else:
        counts = torch.tensor([masks.count_pruned(weights, segments, i) for i in every])
    return weights.total(counts)


def write_effective(
    weights: LatentWeights,
    segments: Sequence[Segment],
    operator: Operator,
    out: Sequence[Tensor],
    factors: Mapping[int, Tensor] = NO_FACTORS,
) -> None:
    """Write u: 0 for pruned weights, the operator's value for kept ones.

    A kept weight is never rounded to 0: it takes the smallest number of its type instead.

    Args:
        weights: the latent weights w.
        segments: cover all weights once.
        operator: maps kept weights to effective ones.
        out: local tensors in the shapes and layouts of the views. They are overwritten.
        factors: by position of a tensor that `has_rows`, a factor for each of its local rows.

    Example:
        >>> from torch_feather.operators import Soft
        >>> from torch_feather.selection import Cutoff
        >>> weights, out = LatentWeights([torch.tensor([0.5, -1.0, 2.0])]), torch.empty(3)
        >>> cutoff = Cutoff(torch.tensor(0.5), torch.tensor(2), torch.tensor(0.5))
        >>> write_effective(weights, [Segment(0, 3, cutoff)], Soft(), [out])
        >>> out.tolist()
        [0.0, -0.5, 1.5]
    """
    if not devices.synchronizes(weights.device):
        plain.write_effective(weights, segments, operator, out, factors)
        return
    if not triton_passes.write_effective(weights, segments, operator, out):
        _write_device(weights, segments, operator, out)
    for i, factor in factors.items():
        out[i].mul_(factor.view(-1, *[1] * (out[i].dim() - 1)))


def write_each(
    weights: LatentWeights,
    function: Callable[..., None],
    out: Sequence[Tensor],
    *more: Sequence[Tensor],
) -> None:
    """Write effective weights by an elementwise function; on a CPU range by range in the cache.

    Args:
        weights: the latent weights w.
        function: called with parts of w, of the tensors in `more` and of `out`, which it writes.
        out: local tensors in the shapes, layouts and types of the views. They are overwritten.
        more: other tensors in the same shapes and layouts.

    Example:
        >>> weights, u = LatentWeights([torch.tensor([0.5, 2.0])]), torch.empty(2)
        >>> write_each(weights, lambda w, m, out: torch.mul(w, m, out=out), [u], [torch.zeros(2)])
        >>> u
        tensor([0., 0.])
    """
    if not devices.synchronizes(weights.device):
        plain.write_each(weights, function, out, *more)
        return
    for parts in zip(weights.views, *more, out, strict=True):
        for block in blocks(*parts):
            function(*block)


def _write_device(
    weights: LatentWeights, segments: Sequence[Segment], operator: Operator, out: Sequence[Tensor]
) -> None:
    """Write effective weights without a host read."""
    flats = [torch.empty_like(part.flat) for part in weights.parts]
    for part, flat in zip(weights.parts, flats, strict=True):
        zero = flat.new_zeros(())
        for segment in segments:
            first, end = weights.local_range(segment.start, segment.stop)
            start, stop = max(first, part.start), min(end, part.stop)
            for a in range(start, stop, DEVICE_BLOCK):
                inside = slice(a - part.start, min(a + DEVICE_BLOCK, stop) - part.start)
                block = part.flat[inside].to(weights.wide)
                kept = kept_values(block, segment.threshold, operator, flat.dtype)
                torch.where(segment.pruned(block.abs(), a), zero, kept, out=flat[inside])
    copy_all(out, weights.like(flats).views)


def adopt_written(
    weights: LatentWeights,
    which: Sequence[int],
    values: Sequence[Tensor],
    effective: Sequence[Tensor],
) -> None:
    """Adopt values that differ from their effective weights as latent weights, in place.

    Many small operations are slow on accelerators, so neighbours are compared together there. On
    a CPU the copies would cost several times what they save.

    Args:
        weights: the latent weights, which are written.
        which: positions of the tensors to compare.
        values: values of the parameters, one local tensor per view.
        effective: the effective weights that they were given.

    Example:
        >>> weights = LatentWeights([torch.tensor([0.5, 2.0])])
        >>> adopt_written(weights, [0], [torch.tensor([0.0, 3.0])], [torch.tensor([0.0, 2.0])])
        >>> weights.views[0].tolist()  # 0 is the effective weight of 0.5, 3.0 is new
        [0.5, 3.0]
    """
    if triton_passes.adopt(weights, which, values, effective):
        return
    on_device = devices.synchronizes(weights.device)
    for run in runs(weights, which) if on_device else [[i] for i in which]:
        held, given = joined(weights, run, values), joined(weights, run, effective)
        latent = joint(weights, run)
        latent.copy_(torch.where(held == given, latent, held))
