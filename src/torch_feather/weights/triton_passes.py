"""Launches of the passes over many tensors (`triton_kernels.py`).

Each function does its work in one launch per type of weights and returns True, or returns False
if another form must do it: without Triton, or for layouts and operators that the kernels lack.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import launching
from ..operators import Operator, Power
from .latent import LatentWeights
from .segments import Segment
from .tables import BLOCK, tables


def copy(
    weights: LatentWeights, positions: Sequence[int], tensors: Sequence[Tensor], reads: bool
) -> bool:
    """Copy tensors into latent weights if `reads`, else latent weights into tensors.

    Args:
        weights: the latent weights.
        positions: positions of weight tensors.
        tensors: a local tensor for each position.
        reads: the direction.

    Example:
        >>> copy(LatentWeights([torch.ones(2)]), [0], [torch.ones(2)], reads=True)  # on a CPU
        False
    """
    if not launching.uses_triton(weights.device):
        return False
    found = tables(weights, positions, [tensors])
    if found is None:
        return False
    from .triton_kernels import copy_ranges

    for part, rows, (base,) in found:
        launching.launch(copy_ranges, len(rows), rows, part.flat, base, READS=reads, BLOCK=BLOCK)
    increment_version(weights.flats if reads else list(tensors))
    return True


def adopt(
    weights: LatentWeights,
    which: Sequence[int],
    values: Sequence[Tensor],
    effective: Sequence[Tensor],
) -> bool:
    """Adopt values as latent weights; arguments as for `passes.adopt_written`.

    Example:
        >>> adopt(LatentWeights([torch.ones(2)]), [0], [torch.ones(2)], [torch.ones(2)])
        False
    """
    if not launching.uses_triton(weights.device):
        return False
    lists = [[values[i] for i in which], [effective[i] for i in which]]
    found = tables(weights, which, lists)
    if found is None:
        return False
    from .triton_kernels import adopt_ranges

    for part, rows, (held, given) in found:
        launching.launch(adopt_ranges, len(rows), rows, part.flat, held, given, BLOCK=BLOCK)
    increment_version(weights.flats)
    return True


def write_effective(
    weights: LatentWeights, segments: Sequence[Segment], operator: Operator, out: Sequence[Tensor]
) -> bool:
    """Write effective weights; arguments as for `passes.write_effective`.

    Example:
        >>> from torch_feather.operators import Hard
        >>> write_effective(LatentWeights([torch.ones(2)]), [], Hard(), [torch.ones(2)])
        False
    """
    exponent = _exponent(operator, weights.wide)
    if exponent is None or not launching.uses_triton(weights.device):
        return False
    found = tables(weights, range(len(out)), [out], segments)
    if found is None:
        return False
    from .triton_kernels import write_ranges

    scaled = any(segment.scale is not None for segment in segments)
    numbers = _numbers(segments, weights.wide, scaled)
    for part, rows, (base,) in found:
        launching.launch(
            write_ranges, len(rows), rows, part.flat, base, part.start, *numbers, P=exponent,
            SCALED=scaled, DOUBLE=weights.wide == torch.float64,
            BITS=8 * part.flat.element_size(), BLOCK=BLOCK,
        )  # fmt: skip
    increment_version(list(out))
    return True


def _exponent(operator: Operator, wide: torch.dtype) -> int | None:
    """Return p of an operator that the kernels compute with the bits of PyTorch; 0 for Hard."""
    if operator.is_identity:
        return 0
    known = (1.0,) if wide == torch.float64 else (1.0, 2.0, 3.0)
    return int(operator.p) if type(operator) is Power and operator.p in known else None


def _numbers(segments: Sequence[Segment], wide: torch.dtype, scaled: bool) -> list[Tensor]:
    """Return value, last index and threshold of the cutoff of each segment, and its scale."""
    cutoffs = [segment.cutoff for segment in segments]
    if len(segments) == 1 and not scaled:
        (cutoff,) = cutoffs
        return [cutoff.value.to(wide), cutoff.last, cutoff.threshold.to(wide), cutoff.value]
    value, last, tau = (torch.stack(field) for field in zip(*cutoffs, strict=True))
    value, tau = value.to(wide), tau.to(wide)
    if not scaled:
        return [value, last, tau, value]
    one = torch.ones((), dtype=wide, device=tau.device)
    scale = torch.stack([one if s.scale is None else s.scale.to(wide) for s in segments])
    stacked = Segment(0, 0, cutoffs[0]._replace(threshold=tau), scale)
    return [value, last, stacked.threshold, scale]


def pull_back(gradient: Tensor, effective: Tensor, cutoff: Tensor, theta: float) -> Tensor | None:
    """Return the gradient, that of pruned weights times theta; None if PyTorch must do it.

    Args:
        gradient: dL/du.
        effective: u.
        cutoff: value of the cutoff; at 0 or below, all weights are kept.
        theta: factor for pruned weights.

    Example:
        >>> pull_back(torch.ones(2), torch.ones(2), torch.tensor(0.5), 0.5) is None  # on a CPU
        True
    """
    if not launching.uses_triton(gradient.device):
        return None
    alike = gradient.stride() == effective.stride() and gradient.dtype != torch.float64
    differentiable = torch.is_grad_enabled() and gradient.requires_grad
    if not alike or differentiable:
        return None
    from .triton_kernels import scale_pruned

    out = torch.empty_like(gradient)
    if size := gradient.numel():
        launching.launch(
            scale_pruned, -(-size // BLOCK), gradient, effective, cutoff, out, size,
            _rounded(theta, gradient.dtype), BLOCK=BLOCK,
        )  # fmt: skip
    return out


@cache
def _rounded(theta: float, dtype: torch.dtype) -> float:
    """Return theta as a number of a type."""
    return float(torch.tensor(theta, dtype=dtype))
