"""ST-3: soft thresholds with a rescaling of each output channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..allocation import Allocation
from ..context import MethodContext
from ..gradient_rules import StraightThrough
from ..operators import Soft
from ..prunable import output_groups, unwrap
from ..schedules import Schedule
from ..weights.latent import LatentWeights
from ..weights.passes import pruned_mask, row_sums, write_effective
from ..weights.rows import has_rows
from ..weights.segments import Segment
from .base import Pruning
from .magnitude import MagnitudePruning, Method
from .options import make_allocation, make_schedule


def st3(
    *,
    sparsity: float,
    allocation: str | Allocation = "global",
    schedule: str | Schedule = "cubic",
    begin: int = 0,
    end: int | None = None,
) -> Method:
    """Return ST-3: soft thresholds, rescaled output channels, straight-through gradients.

    Source: Vanderschueren and De Vleeschouwer (WACV 2023). Their sparsity rises from epoch 5 on:
    set `begin` to its steps.

    Args:
        sparsity: final fraction of zeros.
        allocation, schedule, begin, end: as for `feather`.

    Example:
        >>> st3(sparsity=0.9).operator
        Power(p=1.0)
    """
    return RescaledMethod(
        operator=Soft(),
        gradient=StraightThrough(1.0),
        allocation=make_allocation(allocation),
        schedule=make_schedule(schedule, begin, end),
    )


st3_sigma = partial(st3, allocation="sigma")
st3_sigma.__doc__ = """Return `st3` with the ranking |w| sqrt(sum of the dimensions of its tensor).

Source: as for `st3`, variant sigma.

Example:
    >>> st3_sigma(sparsity=0.9).allocation
    Sigma()
"""


@dataclass(frozen=True)
class RescaledMethod(Method):
    """A `Method` whose kept weights are rescaled per output channel.

    Example:
        >>> method = st3(sparsity=0.9)
        >>> type(method).__name__, method.operator
        ('RescaledMethod', Power(p=1.0))
    """

    def bind(self, context: MethodContext) -> Rescaled:
        return Rescaled(context, self)


class Rescaled(MagnitudePruning):
    """A `RescaledMethod` on one model: multiplies kept weights by 1.01 / (r + .01) per channel.

    r is the kept fraction of the output channel's sum of |w|: r = (mean of |w| with pruned weights
    as 0, + 1e-6) / (mean of |w| + 1e-6). The factor is not differentiated.

    Args:
        context: the model, its prunable weights, the target and the number of steps.
        method: the parts of the method.

    Example:
        >>> from torch import nn
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> bound = st3(sparsity=0.5, schedule="constant").bind(context)
        >>> u = torch.empty(1, 4)
        >>> bound.write_effective(weights, bound.update(weights, torch.tensor(0)), [u])
        >>> u  # (3 - 2) and (4 - 2) times 1.01 / (7 / 10 + 0.01)
        tensor([[0.0000, 0.0000, 1.4225, 2.8451]])
    """

    def __init__(self, context: MethodContext, method: Method):
        super().__init__(context, method)
        model = unwrap(context.model)
        paths = [name.rpartition(".")[0] for name in context.names]
        self._groups = [output_groups(unwrap(model.get_submodule(path))) for path in paths]
        # If outputs are not in dimension 0, a shard holds parts of all output channels.
        first = all(groups is None for groups in self._groups)
        self.facts = replace(self.facts, on_shards=self.facts.on_shards and first)

    @property
    def fingerprint(self) -> str:
        return f"rescaled {super().fingerprint}"

    def write_effective(
        self, weights: LatentWeights, pruning: Pruning, out: Sequence[Tensor]
    ) -> None:
        in_rows = [i for i in range(len(out)) if self._in_rows(weights, i)]
        sums = row_sums(weights, pruning.segments, in_rows)
        means = {i: x / weights.views[i][0].numel() for i, x in zip(in_rows, sums, strict=True)}
        # In the order of the tensors: the factors of shards are communicated, and which tensors lie
        # in rows may differ between processes.
        factors = self._factors(
            weights,
            [
                means[i] if i in means else self._means(weights, pruning.segments, i)
                for i in range(len(out))
            ],
        )
        write_effective(
            weights, pruning.segments, self.operator, out, {i: factors[i] for i in in_rows}
        )
        for i, (u, factor) in enumerate(zip(out, factors, strict=True)):
            if i in means:
                continue
            if (groups := self._groups[i]) is not None:
                u, factor = u.unflatten(0, (groups, -1)), factor.view(groups, 1, -1)
            u.mul_(factor.view(*factor.shape, *[1] * (u.dim() - factor.dim())))

    def _in_rows(self, weights: LatentWeights, i: int) -> bool:
        """Return whether the output channels of tensor i lie one after the other in memory."""
        return self._groups[i] is None and has_rows(weights, i)

    def _means(self, weights: LatentWeights, segments: Sequence[Segment], i: int) -> Tensor:
        """Return the means of |w| over the output channels of tensor i: of kept, of all weights."""
        magnitude = self._by_channel(i, weights.views[i].abs().to(weights.wide))
        kept = magnitude * ~self._by_channel(i, pruned_mask(weights, segments, i))
        return torch.stack([kept.mean(1), magnitude.mean(1)], 1)

    def _factors(self, weights: LatentWeights, means: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the factors of the output channels of each tensor, from their means of |w|."""
        whole = [weights.row_means(i, x) for i, x in enumerate(means)]
        part, total = torch.cat(whole).unbind(1)
        ratio = (part + 1e-6) / (total + 1e-6)
        # NaN or infinite weights leave their channel unchanged.
        factors = (1.01 / (ratio + 0.01)).nan_to_num_(nan=1.0)
        return factors.split([len(x) for x in means])

    def _by_channel(self, i: int, x: Tensor) -> Tensor:
        """Return the local values of tensor i in shape (output channels, weights of each)."""
        if (groups := self._groups[i]) is not None:
            x = x.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return x.reshape(len(x), x.shape[1:].numel())
