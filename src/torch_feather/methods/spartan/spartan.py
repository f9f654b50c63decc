"""Spartan: weights times a soft top-k mask, cut hard, and differentiated through the mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import devices
from ...allocation import Allocation
from ...errors import ConfigurationError
from ...gradient_rules import StraightThrough
from ...operators import Hard
from ...schedules import Linear, count_steps
from ...weights.latent import LatentWeights, Segment, copy_all, renew, visible
from ..base import Setting
from ..magnitude import Method, make_allocation
from ..thresholded import Scheduled
from .soft_top_k import SoftTopK, sharing, soft_top_k


def spartan(
    *,
    sparsity: float,
    beta: float = 20.0,
    allocation: str | Allocation = "global",
    end: int | None = None,
    freeze: int | None = None,
) -> SpartanMethod:
    """Weights times a soft top-k mask that sharpens, and is frozen for the last fifth of training.

    Source: Tai, Tian and Lim (NeurIPS 2022), and its public code for the schedules.

    Args:
        sparsity: final share of zeros.
        beta: inverse temperature from step `freeze` on; it rises linearly from 1. It multiplies
            |w|, so its meaning depends on the scale of the weights. Published: 10 for ResNet-50,
            20 else.
        allocation: as for `feather`; budgets are those of the layers, or of the network. With an
            allocation that ranks |w| / c, c is the cost of a weight:
            `FlopsBiased(gamma=1, example_input=x)` is the published one for multiply-adds.
        end: step up to which the sparsity rises linearly; a fifth of training by default.
        freeze: step from which on the mask is a constant; the last fifth of training by default.
    """
    return SpartanMethod(beta, make_allocation(allocation), end, freeze)


@dataclass(frozen=True)
class SpartanMethod:
    """Spartan's parts; see `spartan`."""

    beta: float
    allocation: Allocation
    end: int | None = None
    freeze: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.beta, int | float) or not 0 < self.beta < math.inf:
            raise ConfigurationError(f"beta must be a number > 0, got {self.beta!r}.")
        object.__setattr__(self, "beta", float(self.beta))  # 20 and 20.0 are one method
        count_steps(self, "end", "freeze")

    def attach(self, setting: Setting) -> Spartan:
        """See `AnyMethod`."""
        total = setting.total_steps
        end = max(total // 5, 1) if self.end is None else self.end
        freeze = max(total - total // 5, end) if self.freeze is None else self.freeze
        if not end <= freeze <= total:
            raise ConfigurationError(
                f"The mask is to be frozen when the sparsity is reached and before training ends: "
                f"end <= freeze <= total_steps, got end={end}, freeze={freeze}, "
                f"total_steps={total}."
            )
        cut = Method(Hard(), StraightThrough(1.0), self.allocation, Linear(0, end))
        return Spartan(setting, cut, self.beta, freeze)


class Spartan(Scheduled):
    """u = w m on kept weights, with m the soft top-k mask around the scheduled hard cut.

    The cut is straight-through, the mask is not: with v = |w|, G = g w and g = dL/du,

        dL/dw = g m + sign(w) beta m (1 - m) (G / c - X),   X = sum G m (1 - m) / sum c m (1 - m)

    for all weights. The sums run over all weights that share a budget, so X is added at the step.
    (The paper has k - sum c m^2 for the latter sum; the two are equal.) Once the mask is frozen it
    is a constant, 0 on pruned weights: dL/dw = g m.

    State, each by tensor: `mask`, m on kept weights and 0 elsewhere; `threshold`, up to which
    magnitudes were pruned when the mask was made; `frozen`, whether it stays.
    """

    completes = True
    keeps_zeros = False  # soft masks of that budget would shrink all other weights at once
    on_shards = False

    def __init__(self, setting: Setting, method: Method, beta: float, freeze: int):
        super().__init__(setting, method)
        self.beta, self.freeze = beta, freeze
        weights, n = setting.weights, len(setting.weights.views)
        self.state |= {  # beside the allocation's
            "mask": weights.numbers(1.0).views,
            "threshold": torch.zeros(n, dtype=weights.wide, device=weights.device),
            "frozen": torch.zeros(n, dtype=torch.bool, device=weights.device),
        }
        self._soft: SoftTopK | None = None
        self._segment_of: list[int] = []  # of each tensor

    @property
    def identity(self) -> str:
        """See `Reparametrization`."""
        return f"spartan {self.beta} {self.freeze} {super().identity}"

    @property
    def _masks(self) -> list[Tensor]:
        return list(self.state["mask"])

    @property
    def _frozen(self) -> Tensor:
        """Whether the masks are constants, 0-dimensional."""
        return self._entry("frozen").all()

    def _entry(self, name: str) -> Tensor:
        entry = self.state[name]
        assert isinstance(entry, Tensor)
        return entry

    # The mask

    def refresh(self, weights: LatentWeights, step: Tensor) -> None:
        """See `Reparametrization`."""
        done = step >= self.freeze
        stays = self._entry("frozen") & done
        look = not devices.synchronizes(weights.device)
        if look and stays.all():
            return
        masks, soft, segments = self._solve(weights, step)
        self.segments = renew(self.segments, segments)
        if self._soft is None or self._soft.shift.shape != soft.shift.shape:
            self._soft = soft
        else:
            copy_all(self._soft, soft)
        every = range(len(weights.views))
        self._segment_of = [weights.place_of(i, segments) for i in every]
        new = [*masks, torch.stack([segments[j].threshold for j in self._segment_of])]
        old = [*self._masks, self._entry("threshold")]
        if not look or stays.any():  # what several optimizers hold is loaded part by part
            conditions = [*stays, stays]
            new = list(map(torch.where, conditions, old, new))
        copy_all([*old, self._entry("frozen")], [*new, done.expand(len(masks))])

    def _solve(
        self, weights: LatentWeights, step: Tensor
    ) -> tuple[list[Tensor], SoftTopK, list[Segment]]:
        """The masks of these latent weights after `step` steps, 0 on pruned weights."""
        segments = self.cuts(weights, step)
        beta = 1 + (self.beta - 1) * (step.double() / self.freeze).clamp(max=1)
        soft = soft_top_k(weights, segments, beta)
        masks = []
        for i, w in enumerate(weights.views):
            j = weights.place_of(i, segments)
            m = soft.mask(w.abs().to(weights.wide), j)
            masks.append(m.masked_fill_(weights.pruned(i, segments), 0.0))
        return masks, soft, segments

    def images(self, weights: LatentWeights) -> tuple[list[Tensor], Tensor]:
        """See `Reparametrization`."""
        images = [_image(w, m) for w, m in zip(weights.views, self._masks, strict=True)]
        return images, torch.stack([u.sum(dtype=weights.wide) for u in images]).sum()

    def images_of(self, weights: LatentWeights, step: Tensor) -> list[Tensor]:
        """See `Reparametrization`."""
        masks = self._masks
        if devices.synchronizes(weights.device) or not self._frozen:
            new, *_ = self._solve(weights, step)
            masks = [torch.where(self._frozen, a, b) for a, b in zip(masks, new, strict=True)]
        return [_image(w, m) for w, m in zip(weights.views, masks, strict=True)]

    def pruned(self, weights: LatentWeights, i: int) -> Tensor:
        """See `Reparametrization`."""
        return self._masks[i] == 0

    def threshold(self, weights: LatentWeights, i: int) -> Tensor:
        """See `Reparametrization`."""
        return self.state["threshold"][i]

    # Gradients

    @property
    def pulls_back(self) -> bool:  # type: ignore[override]
        """See `Reparametrization`."""
        return True

    def _mask_and_gain(self, weights: LatentWeights, i: int) -> tuple[Tensor, Tensor]:
        """m before the cut and 1 + beta (1 - m) v / c, for all weights of tensor i."""
        assert self._soft is not None
        j, magnitudes = self._segment_of[i], weights.views[i].abs().to(weights.wide)
        m = self._soft.mask(magnitudes, j)
        rate = self._soft.beta * self._soft.scale[j]
        if devices.synchronizes(weights.device):
            m = torch.where(self._frozen, self._masks[i], m)
            rate = rate.masked_fill(self._frozen, 0.0)
        return m, (1 - m).mul_(magnitudes).mul_(rate).add_(1)

    def pull_back(self, weights: LatentWeights, i: int, gradient: Tensor, image: Tensor) -> Tensor:
        """What is elementwise: g m + sign(w) beta m (1 - m) g w / c, for pruned weights too."""
        if not devices.synchronizes(weights.device) and self._frozen:
            factor = self._masks[i]
        else:
            m, gain = self._mask_and_gain(weights, i)
            factor = m.mul_(gain)
        return (gradient * factor).to(gradient.dtype)

    def complete(
        self, weights: LatentWeights, parameters: Sequence[nn.Parameter], scale: Tensor | None
    ) -> None:
        """The cross term X; it is linear in the gradients, so their scale does not matter."""
        if not devices.synchronizes(weights.device) and self._frozen:
            return
        assert self._soft is not None
        sums = torch.zeros(len(self.segments), 2, dtype=torch.float64, device=weights.device)
        slopes = []
        for i, (p, w) in enumerate(zip(parameters, weights.views, strict=True)):
            m, gain = self._mask_and_gain(weights, i)
            rest, j = 1 - m, self._segment_of[i]
            slopes.append(m.mul_(rest))
            sums[j, 1] += slopes[i].sum() / self._soft.scale[j]
            if p.grad is not None:  # it is g m gain, of which g w m (1 - m) is to be summed
                sums[j, 0] += rest.mul_(w).div_(gain).mul_(p.grad).sum()
        top, bottom = (sharing(weights, self.segments) @ sums).unbind(1)
        # Where all m are 0 or 1, nothing is shared; nor is what overflowed: GradScaler skips the
        # optimizer of those weights, and no other.
        cross = torch.where(bottom > 0, top / bottom, 0.0).nan_to_num_(0.0, 0.0, 0.0)
        cross *= self._soft.beta
        cross = cross.masked_fill(self._frozen, 0.0)
        for j, slope, p, w in zip(self._segment_of, slopes, parameters, weights.views, strict=True):
            if p.grad is not None:
                p.grad -= slope.mul_(w.sign()).mul_(cross[j])

    def move(self, weights: LatentWeights) -> None:
        """See `Reparametrization`."""
        masks = weights.numbers(1.0).views
        copy_all(masks, self._masks)
        super().move(weights)
        self.state["mask"] = masks
        self._soft = None


def _image(w: Tensor, mask: Tensor) -> Tensor:
    """w m, laid out like w; 0 only where the mask or w is."""
    image = visible((w * mask).to(w.dtype), w)
    return image.masked_fill_(mask == 0, 0.0)
