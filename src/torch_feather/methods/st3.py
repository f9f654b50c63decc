"""ST-3: soft thresholds whose shrinkage is made good channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..allocation import Allocation
from ..gradient_rules import StraightThrough
from ..operators import Soft
from ..prunable import output_groups, unwrap
from ..schedules import Schedule
from ..weights.latent import LatentWeights, Segment
from .base import Setting
from .magnitude import Method, make_allocation, make_schedule
from .thresholded import Scheduled


def st3(
    *,
    sparsity: float,
    allocation: str | Allocation = "global",
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
) -> Method:
    """Soft threshold, output channels rescaled; pruned weights get their gradient too.

    Source: Vanderschueren and De Vleeschouwer (WACV 2023). Their sparsity rises from epoch 5 on:
    set `begin` to its steps.

    Args:
        sparsity: final share of zeros.
        allocation, schedule, begin, end: as for `feather`.
    """
    return RescaledMethod(
        operator=Soft(),
        gradient=StraightThrough(1.0),
        allocation=make_allocation(allocation),
        schedule=make_schedule(schedule, begin, end),
    )


st3_sigma = partial(st3, allocation="sigma")
st3_sigma.__doc__ = """`st3` that ranks |w| times the root of the sum of its tensor's dimensions."""


@dataclass(frozen=True)
class RescaledMethod(Method):
    """A `Method` whose kept weights are scaled up channel by channel."""

    def attach(self, setting: Setting) -> Rescaled:
        """See `AnyMethod`."""
        return Rescaled(setting, self)


class Rescaled(Scheduled):
    """Per output channel, kept weights times 1.01 / (r + .01), with r their share of the sum |w|.

    With r = (mean of |w| over kept weights, pruned ones as 0, + 1e-6) / (mean of |w| + 1e-6). The
    factor is not differentiated.
    """

    def __init__(self, setting: Setting, method: Method):
        super().__init__(setting, method)
        model = unwrap(setting.model)
        paths = [name.rpartition(".")[0] for name in setting.names]
        self._groups = [output_groups(unwrap(model.get_submodule(path))) for path in paths]

    @property
    def on_shards(self) -> bool:  # type: ignore[override]
        """See `Reparametrization`. Shards are of inputs where outputs are not the first."""
        return super().on_shards and all(groups is None for groups in self._groups)

    @property
    def identity(self) -> str:
        """See `Reparametrization`."""
        return f"rescaled {super().identity}"

    def apply(
        self, weights: LatentWeights, segments: Sequence[Segment]
    ) -> tuple[list[Tensor], Tensor]:
        """See `Thresholded`."""
        images, total = super().apply(weights, segments)
        for i, (w, image) in enumerate(zip(weights.views, images, strict=True)):
            magnitude = self._by_channel(i, w.abs().to(weights.wide))
            kept = magnitude * (self._by_channel(i, image) != 0)
            means = torch.stack([kept.mean(1), magnitude.mean(1)], 1)
            part, whole = weights.row_means(i, means).unbind(1)
            share = (part + 1e-6) / (whole + 1e-6)
            # NaN or infinite weights leave their channel as it is.
            factor = (1.01 / (share + 0.01)).nan_to_num_(nan=1.0)
            if (groups := self._groups[i]) is not None:
                image = image.unflatten(0, (groups, -1))
                factor = factor.view(groups, 1, -1)
            image.mul_(factor.view(*factor.shape, *[1] * (image.dim() - factor.dim())))
        return images, total

    def _by_channel(self, i: int, x: Tensor) -> Tensor:
        """What is here of tensor i as (output channels, weights of each)."""
        if (groups := self._groups[i]) is not None:
            x = x.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return x.reshape(len(x), x.shape[1:].numel())
