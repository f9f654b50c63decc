"""ST-3: soft thresholds whose shrinkage is made good channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..allocation import Allocation
from ..gradients import StraightThrough
from ..latent import LatentWeights, Segment
from ..operators import Soft
from ..reparametrization import Setting
from ..schedules import Schedule
from ..thresholded import Scheduled
from .method import Method, make_allocation, make_schedule


def st3(
    *,
    sparsity: float,
    allocation: str | Allocation = "global",
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
) -> Method:
    """Soft threshold, rescaled per output channel, straight-through.

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
st3_sigma.__doc__ = """ST-3 that ranks |w| sqrt(sum of the dimensions of its tensor)."""


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
            row = w.shape[1:].numel()
            magnitude = w.abs().to(weights.wide).reshape(len(w), row)
            means = [(magnitude * (image != 0).reshape(len(w), row)).mean(1), magnitude.mean(1)]
            kept, all_ = weights.row_means(i, torch.stack(means, 1)).unbind(1)
            share = (kept + 1e-6) / (all_ + 1e-6)
            # NaN or infinite weights leave their channel as it is.
            factor = (1.01 / (share + 0.01)).nan_to_num_(nan=1.0)
            image.mul_(factor.view(-1, *[1] * (image.dim() - 1)))
        return images, total
