"""Passes over the weights: masks, effective weights, and external writes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import devices
from ..operators import Operator
from .latent import BLOCK, DEVICE_BLOCK, LatentWeights, copy_all
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
    start, stop = weights.local_spans[i]
    flat = segment_of(weights, segments, i).pruned(weights.local_magnitudes(start, stop), start)
    return flat.as_strided(weights.views[i].shape, weights.views[i].stride())


def count_pruned(weights: LatentWeights, segments: Sequence[Segment]) -> Tensor:
    """Return the number of pruned weights of each tensor, int64 of shape (tensors,).

    Example:
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([0.5, -1.0, 2.0])])
        >>> cutoff = Cutoff(torch.tensor(1.0), torch.tensor(2), torch.tensor(1.0))
        >>> count_pruned(weights, [Segment(0, 3, cutoff)]).tolist()
        [2]
    """
    counts = [pruned_mask(weights, segments, i).sum() for i in range(len(weights.views))]
    return weights.total(torch.stack(counts))


def effective_weights(
    weights: LatentWeights, segments: Sequence[Segment], operator: Operator
) -> list[Tensor]:
    """Return u: 0 for pruned weights, the operator's value for kept ones.

    A kept weight is never rounded to 0: it takes the smallest number of its type instead.

    Args:
        weights: the latent weights w.
        segments: cover all weights once.
        operator: maps kept weights to effective ones.

    Returns:
        One new tensor per view, in its shape and layout.

    Example:
        >>> from torch_feather.operators import Soft
        >>> from torch_feather.selection import Cutoff
        >>> weights = LatentWeights([torch.tensor([0.5, -1.0, 2.0])])
        >>> cutoff = Cutoff(torch.tensor(0.5), torch.tensor(2), torch.tensor(0.5))
        >>> effective_weights(weights, [Segment(0, 3, cutoff)], Soft())[0].tolist()
        [0.0, -0.5, 1.5]
    """
    out: list[Tensor] = [torch.empty(0)] * len(weights.views)
    on_device = devices.synchronizes(weights.device)
    write = _write_device if on_device else _write_cpu
    if weights.shards is not None and not on_device:
        # Vector instructions round differently from the scalar code for the rest of a range. One
        # range per tensor gives all copies of a tensor the same bits on all processes.
        segments = [
            segment_of(weights, segments, i)._replace(start=start, stop=stop)
            for i, (start, stop) in enumerate(weights.spans)
        ]
    for part in weights.parts:
        flat = torch.empty_like(part.flat)
        for segment in segments:
            first, end = weights.local_range(segment.start, segment.stop)
            a, b = max(first, part.start), min(end, part.stop)
            if a < b:
                inside = slice(a - part.start, b - part.start)
                write(part.flat[inside], segment, operator, a, flat[inside], weights.wide)
        for i, view in enumerate(weights.views):
            if weights.part_of(i) is part:
                start = weights.local_spans[i][0] - part.start
                out[i] = flat.as_strided(view.shape, view.stride(), start)
    return out


def _write_device(
    w: Tensor, segment: Segment, operator: Operator, offset: int, out: Tensor, wide: torch.dtype
) -> None:
    """Write the effective weights of `w` without a host read."""
    threshold = segment.threshold
    for a in range(0, w.numel(), DEVICE_BLOCK):
        block = w[a : a + DEVICE_BLOCK].to(wide)
        kept = kept_values(block, threshold, operator, w.dtype)
        pruned = segment.pruned(block.abs(), offset + a)
        out[a : a + DEVICE_BLOCK] = kept.masked_fill(pruned, 0.0)


def _write_cpu(
    w: Tensor, segment: Segment, operator: Operator, offset: int, out: Tensor, wide: torch.dtype
) -> None:
    """Compare block by block in the cache, and apply the operator to kept weights alone."""
    cutoff, threshold, scale = segment.cutoff, segment.threshold, segment.scale
    if cutoff.value < 0 and (operator.is_identity or operator.identity_at_zero):
        out.copy_(w)
        return
    value, last = cutoff.value.item(), int(cutoff.last)
    out.zero_()
    # As integers: for half precision, scatter_ takes time in proportion to `out`, not to `index`.
    bits = out.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[out.element_size()])
    kept: list[np.ndarray] = []
    pending = 0
    for a in range(0, w.numel(), BLOCK):
        scores = w[a : a + BLOCK].to(wide).abs()
        if scale is not None:
            scores *= scale
        # No comparison holds for NaN, which is kept.
        if offset + a + scores.numel() - 1 <= last:
            pruned = scores.numpy() <= value
        elif last < offset + a:
            pruned = scores.numpy() < value
        else:
            pruned = cutoff.pruned(scores, offset + a).numpy()
        index = np.logical_not(pruned, out=pruned).nonzero()[0]
        index += a
        kept.append(index)
        pending += index.size
        if pending >= BLOCK or a + BLOCK >= w.numel():
            chosen = torch.from_numpy(np.concatenate(kept))
            values = kept_values(w[chosen].to(wide), threshold, operator, w.dtype)
            bits.scatter_(0, chosen, values.view(bits.dtype))
            kept, pending = [], 0


def kept_values(w: Tensor, tau: Tensor, operator: Operator, dtype: torch.dtype) -> Tensor:
    """Return the effective values of kept weights `w` in type `dtype`, 0 only if w is 0.

    Example:
        >>> from torch_feather.operators import Soft
        >>> kept_values(torch.tensor([2.0]), torch.tensor(0.5), Soft(), torch.float32)
        tensor([1.5000])
    """
    if operator.is_identity:
        return w.to(dtype)
    return keep_nonzero(operator(w, tau).to(dtype), w)


def keep_nonzero(values: Tensor, w: Tensor) -> Tensor:
    """Return `values`, with 0 replaced by the smallest number of their type unless w is 0.

    Example:
        >>> w = torch.tensor([1e-9, 0.0])
        >>> keep_nonzero(w.half(), w) > 0
        tensor([ True, False])
    """
    info = torch.finfo(values.dtype)
    least = values.new_full((), info.smallest_normal * info.eps)
    vanished = (values == 0) & (w != 0)
    return torch.where(vanished, least.copysign(w.to(values.dtype)), values)


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
    runs = [[i] for i in which]
    if devices.synchronizes(weights.device):
        runs = weights.constant(("runs", *which), lambda weights: _runs(weights, which))
    for run in runs:
        held, given = _joined(weights, run, values), _joined(weights, run, effective)
        latent = _joint(weights, run)
        latent.copy_(torch.where(held == given, latent, held))


def _runs(weights: LatentWeights, which: Sequence[int]) -> list[list[int]]:
    """Return the tensors in runs of neighbours, of one tensor or at most `DEVICE_BLOCK` weights."""
    runs: list[list[int]] = []
    end = length = 0
    for i in sorted(which, key=weights.local_spans.__getitem__):
        (start, stop), size = weights.local_spans[i], weights.views[i].numel()
        same = bool(runs) and weights.part_of(i) is weights.part_of(runs[-1][0])
        if not same or start != end or length + size > DEVICE_BLOCK:
            runs.append([])
            length = 0
        runs[-1].append(i)
        end, length = stop, length + size
    return runs


def _joint(weights: LatentWeights, run: Sequence[int]) -> Tensor:
    """Return the latent weights of a run: flat, or in its shape for a single tensor."""
    if len(run) == 1:
        return weights.views[run[0]]
    part = weights.part_of(run[0])
    start, stop = weights.local_spans[run[0]][0], weights.local_spans[run[-1]][1]
    return part.flat[start - part.start : stop - part.start]


def _joined(weights: LatentWeights, run: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors of a run, joined in the layout of `_joint`."""
    if len(run) == 1:
        return tensors[run[0]]
    out = torch.empty_like(_joint(weights, run))
    first = weights.local_spans[run[0]][0]
    layout = [(weights.views[i], weights.local_spans[i][0] - first) for i in run]
    copy_all(
        [out.as_strided(view.shape, view.stride(), start) for view, start in layout],
        [tensors[i] for i in run],
    )
    return out
