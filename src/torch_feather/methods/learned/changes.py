"""Sums of dL/dw (u - w) over weight tensors, from which gradients of thresholds follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ... import devices
from ...operators import Operator
from ...threads import for_each, scratch
from ...weights.checksum import checksum_of_rows, dot
from ...weights.latent import LatentWeights, sum_blocks
from ...weights.ranges import arrays, ranges
from ...weights.sums import Leaving, Recorded, Sums, versions
from ..base import Gradients


def sums_of_changes(
    weights: LatentWeights,
    operator: Operator,
    tau: Callable[[int], Tensor],
    effective: Sequence[Tensor],
    gradients: Gradients,
) -> Tensor:
    """Return the sum of dL/dw (u - w) over each local tensor; 0 for those without a gradient.

    Args:
        weights: the latent weights w.
        operator: gives the effective values of kept weights.
        tau: returns the threshold of a tensor, 0-dimensional; called if u is rounded.
        effective: u of each tensor, read for the last time; on a CPU, the same pass may find the
            sums of `Recorded` ones, and let latent weights take the place of `Leaving` ones.
        gradients: dL/dw of each tensor, or None.

    Example:
        >>> from torch_feather.operators import Hard
        >>> weights = LatentWeights([torch.tensor([1.0, 2.0])])
        >>> u, g = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 4.0])
        >>> sums_of_changes(weights, Hard(), lambda i: torch.tensor(1.0), [u], [g])
        tensor([-3.])
    """
    views, given = weights.views, [g for g in gradients if g is not None]
    if len(given) == len(views) and not devices.synchronizes(weights.device):
        pairs = zip(given, views, strict=True)
        if all(g.dtype == w.dtype == weights.wide and g.stride() == w.stride() for g, w in pairs):
            return _on_cpu(weights, effective, given)
    found = []
    for i, (w, u, g) in enumerate(zip(views, effective, gradients, strict=True)):
        t = tau(i)

        def of_block(w: Tensor, u: Tensor, g: Tensor, t: Tensor = t) -> Tensor:
            change = _unrounded(operator, w, u, t) - w
            return (change * g).sum(dtype=t.dtype)

        found.append(t.new_zeros(()) if g is None else sum_blocks(of_block, w, u, g))
    return torch.stack(found)


def _on_cpu(
    weights: LatentWeights, effective: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Tensor:
    """Return the sums for tensors of type `wide`, with one read of each."""
    found, recorded = ranges(weights), isinstance(effective, Recorded)
    leaving = effective if isinstance(effective, Leaving) else None
    checksums = np.empty(len(found.size), np.int64)
    kind = np.float64 if weights.wide == torch.float64 else np.float32

    def change(task: tuple[int, np.ndarray, np.ndarray, np.ndarray]) -> float:
        j, latent, held, gradient = task
        if recorded:
            checksums[j] = checksum_of_rows(held)
        w, u = latent.view(kind), held.view(kind)
        with np.errstate(all="ignore"):
            if leaving is None or not leaving.leaves(j, int(checksums[j])):
                values = np.subtract(u, w, out=scratch("values", w.size, kind))
                return dot(values, gradient.view(kind))
            total = dot(np.subtract(u, w, out=u), gradient.view(kind))  # u is not needed any more
        np.copyto(held, latent)
        return total

    held = arrays(weights, effective)
    of_gradients = found.of(gradients)  # not kept: that would hold their memory
    rows = zip(arrays(weights, weights.views), held, of_gradients, strict=True)
    if isinstance(effective, Recorded):
        effective.sums = Sums(versions(effective), checksums, nonfinite=True)
    sums = for_each(change, [(j, *row) for j, row in enumerate(rows)])
    with np.errstate(all="ignore"):
        total = np.bincount(found.position, sums, len(weights.views))
    return torch.from_numpy(total).to(weights.wide)


def _unrounded(operator: Operator, w: Tensor, u: Tensor, tau: Tensor) -> Tensor:
    """Return u before it was rounded to its type, in the type of tau.

    If a threshold is small compared with the weights, u - w is less than the rounding error of
    half precision.
    """
    if u.dtype == tau.dtype:
        return u
    exact = w.to(tau.dtype)
    if not operator.is_identity:
        exact = operator(exact, tau)
    return exact.masked_fill(u == 0, 0.0)
