"""Learned probabilities of keeping each weight, trained through random soft masks.

The network uses u = w m with a mask m in (0, 1) that is drawn again for each step. In the last
phase the mask is frozen at the round((1 - s) N) most probable weights, and u = w m is exactly
sparse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ... import devices
from ...context import MethodContext
from ...errors import ConfigurationError
from ...selection import select
from ...weights.latent import DEVICE_BLOCK, LatentWeights, PerTensor, write_if
from ...weights.passes import write_each
from ..base import BoundMethod, Completion, Facts, Gradients, Pruning, Rate, Summary
from ..own_parameters import Adam
from .passes import BLOCK as BLOCK  # where version 0.1 had them
from .passes import MARGIN as MARGIN
from .passes import draw_on_cpu, inside, write_gradient
from .projection import project_
from .random_numbers import uniform

# Fractions of the epochs at which pruning begins and ends.
BEGIN, END = 0.16, 0.6
MOST_PASSES = 1000  # the paper uses 2; many more are a mistake, such as the number of steps


@dataclass(frozen=True)
class ProbabilisticMethod:
    """Learned probabilities of keeping each weight; its `repr` is the fingerprint.

    Attributes:
        optimizer: optimizer of the probabilities; its lr falls to 0 as a cosine over epochs.
        epochs: number of changes of temperature, sparsity and learning rate; they fill the steps
            before the last phase.
        finetune: fraction of the steps in the last phase.
        passes: forward and backward passes per step, each with its own mask.
        seed: seed of the masks.

    Raises:
        ConfigurationError: a value out of range.

    Example:
        >>> ProbabilisticMethod(Adam(), epochs=300, finetune=0.0625, passes=2, seed=0).passes
        2
    """

    optimizer: Adam
    epochs: int
    finetune: float
    passes: int
    seed: int

    def __post_init__(self) -> None:
        passes = 1 <= self.passes <= MOST_PASSES
        if not self.epochs >= 2 or not 0 <= self.finetune < 1 or not passes:
            raise ConfigurationError(
                "epochs must be at least 2, finetune a fraction of the steps in [0, 1) and passes "
                f"from 1 to {MOST_PASSES}; got epochs={self.epochs!r}, finetune={self.finetune!r}, "
                f"passes={self.passes!r}."
            )

    def bind(self, context: MethodContext) -> ProbabilisticMasks:
        """Return the method on one model."""
        return ProbabilisticMasks(context, self)


class SoftMask(NamedTuple):
    """The pruning of ProbMask.

    Example:
        >>> from torch import nn
        >>> from torch_feather.methods import probmask
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> pruning = probmask(sparsity=0.5).bind(context).update(weights, torch.tensor(0))
        >>> pruning.mask.rows[0].shape
        torch.Size([1, 4])
    """

    mask: PerTensor
    sharpness: Tensor
    """The inverse temperature T, 0-dimensional."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the pruning, each once."""
        return [self.mask.flat, self.sharpness]


class ProbabilisticMasks(BoundMethod):
    """A `ProbabilisticMethod` on one model.

    State: `probability` of each weight, Adam's `mean` and `square` of it, and `draws`, the number
    of masks drawn.

    Args:
        context: the model, its prunable weights, the target and the number of steps.
        method: the parts of the method.

    Example:
        >>> from torch import nn
        >>> from torch_feather.methods import probmask
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> bound = probmask(sparsity=0.5).bind(context)
        >>> mask = bound.update(weights, torch.tensor(bound.target_step)).mask  # frozen
        >>> mask.flat.sum()
        tensor(2.)
    """

    def __init__(self, context: MethodContext, method: ProbabilisticMethod):
        super().__init__(context)
        self.method = method
        self.facts = Facts(
            pulls_back=True,
            completes=True,
            learned=("probability",),
            random="draws",
            passes=method.passes,
        )
        last_phase = round(method.finetune * context.total_steps)
        self.target_step = max(1, context.total_steps - last_phase)
        weights = context.weights
        self._zeros = round(context.sparsity * weights.size)
        draws = torch.zeros(len(weights.views), dtype=torch.int64, device=weights.device)
        self.state = {
            "probability": weights.per_weight(1.0),
            "mean": weights.per_weight(0.0),
            "square": weights.per_weight(0.0),
            "draws": PerTensor.of(draws),
        }

    @property
    def fingerprint(self) -> str:
        return repr(self.method)

    # Schedules, by epochs as published

    def _epoch(self, step: Tensor) -> Tensor:
        """Return the number of completed epochs after `step` steps, 0-dimensional float64."""
        epoch = (step * self.method.epochs).div(self.target_step, rounding_mode="floor")
        return epoch.clamp(max=self.method.epochs).double()

    def _sharpness(self, epoch: Tensor) -> Tensor:
        """Return the inverse temperature T, from 1 to about 30."""
        return 1 / (0.97 * (1 - epoch / self.method.epochs) + 0.03)

    def _budget(self, epoch: Tensor, size: int) -> Tensor:
        """Return how many of `size` weights may be kept."""
        begin, end = (math.floor(fraction * self.method.epochs) for fraction in (BEGIN, END))
        left = (1 - (epoch - begin) / (end - begin)).clamp(0, 1) ** 3
        return size - self._zeros * (1 - left)

    # Masks

    def update(self, weights: LatentWeights, step: Tensor) -> Pruning:
        sharpness, frozen = self._sharpness(self._epoch(step)), step >= self.target_step
        mask = weights.per_weight(None)
        if devices.synchronizes(weights.device):
            self._draw(mask.flat, sharpness)
            mask.flat.copy_(torch.where(frozen, self._most_probable(step), mask.flat))
        elif frozen:
            mask.flat.copy_(self._most_probable(step))
        else:
            self._draw(mask.flat, sharpness)
        return SoftMask(mask, sharpness)

    def _draw(self, out: Tensor, sharpness: Tensor) -> None:
        """Write sigmoid(T (logit(pi) + logistic noise)), with one logarithm for both logits."""
        probability, draws = self.state["probability"].flat, self.state["draws"].flat
        seed, first = self.method.seed, draws[0] * out.numel()
        if not devices.synchronizes(out.device):
            draw_on_cpu(probability, seed, int(first), float(sharpness), out)
            return
        for a in range(0, out.numel(), DEVICE_BLOCK):
            mask = out[a : a + DEVICE_BLOCK]
            u = uniform(seed, first + a, mask.numel(), mask.dtype)
            p = inside(probability[a : a + DEVICE_BLOCK])
            odds = (p * u).div_((1 - p).mul_(1 - u))
            torch.sigmoid(odds.log_().mul_(sharpness), out=mask)

    def _most_probable(self, step: Tensor) -> Tensor:
        """Return the mask of all but the least probable weights, exactly at the target.

        Many probabilities are 0 or 1. Ties are broken at random, by a part of the random sequence
        that comes before the masks.
        """
        scores, k = self.state["probability"].flat, torch.full_like(step, self._zeros)
        last = select(scores.clone, k).value
        size = scores.numel()
        ranks = uniform(self.method.seed, -torch.full_like(step, size), size, scores.dtype)
        ranks.masked_fill_(scores < last, 0.0).masked_fill_(scores > last, 1.0)
        return (~select(ranks.clone, k).pruned(ranks)).to(scores.dtype)

    def write_effective(
        self, weights: LatentWeights, pruning: Pruning, out: Sequence[Tensor]
    ) -> None:
        write_each(weights, _write_product, out, pruning.mask.rows)

    def pruned(self, weights: LatentWeights, pruning: Pruning, i: int) -> Tensor:
        # Sharp masks, and effective weights, may round to 0. All zeros of the network count.
        w, mask = weights.views[i], pruning.mask.rows[i]
        return (mask == 0) | (((mask * w).to(w.dtype) == 0) & (w != 0))

    def summary(self, weights: LatentWeights, pruning: Pruning) -> Summary:
        # The expected count of a mask that keeps each weight with its probability.
        rows = self.state["probability"].rows
        counts = [(1 - p).sum(dtype=torch.float64).round() for p in rows]
        return Summary(learned_counts=torch.stack(counts).long())

    # Gradients

    def pull_back(
        self, weights: LatentWeights, pruning: Pruning, i: int, gradient: Tensor, effective: Tensor
    ) -> Tensor:
        """Return dL/dw = g m."""
        return (gradient * pruning.mask.rows[i]).to(gradient.dtype)

    def complete(
        self,
        weights: LatentWeights,
        pruning: Pruning,
        gradients: Gradients,
        effective: Sequence[Tensor],
        scale: Tensor | None,
    ) -> Completion:
        """Return dL/dpi = dL/dw w T (1 - m) / (pi~ (1 - pi~)), with dL/dw = g m.

        du/dpi = w T m (1 - m) / (pi~ (1 - pi~)), by the derivatives of sigmoid and logit.
        """
        own = weights.per_weight(None)
        probability, mask = self.state["probability"].rows, pruning.mask.rows
        factor = pruning.sharpness if scale is None else pruning.sharpness / scale
        for row, gradient, w, p, m in zip(
            own.rows, gradients, weights.views, probability, mask, strict=True
        ):
            if gradient is None:
                row.zero_()
                continue
            # If gradients overflowed, they are 0: GradScaler skips the optimizer of those weights,
            # and no other.
            write_gradient(row, gradient, w, p, m, factor)
        return Completion(own={"probability": own})

    # The probabilities' own step

    def after_step(
        self,
        weights: LatentWeights,
        pruning: Pruning,
        gradients: Gradients,
        step: Tensor,
        lr: Rate,
        taken: bool | Tensor,
    ) -> None:
        """Step by Adam, then project onto the budget of the epoch, up to the last phase."""
        learning = step <= self.target_step
        if devices.synchronizes(weights.device):
            taken = learning & taken
        elif not learning:
            return
        grads = [row.grad for row in self.state["probability"].rows]
        given = [gradient for gradient in grads if gradient is not None]
        if len(given) < len(grads):
            return
        own = [self.state[name] for name in ("probability", "mean", "square")]
        if taken is not True:
            own = [entry.clone() for entry in own]
        p, mean, square = own
        epoch = self._epoch(step - 1)
        factor = (1 + torch.cos(epoch * (math.pi / self.method.epochs))) / 2
        for i, gradient in enumerate(given):
            self.method.optimizer.step(
                gradient, p.rows[i], mean.rows[i], square.rows[i], step, factor
            )
        project_(p.flat, self._budget(epoch, weights.size))
        if taken is not True:
            targets = [self.state[name].flat for name in ("probability", "mean", "square")]
            write_if(taken, targets, [entry.flat for entry in own])


def _write_product(w: Tensor, mask: Tensor, out: Tensor) -> None:
    """Write w m; adding 0 turns -0 into 0."""
    if mask.dtype == out.dtype:
        torch.mul(mask, w, out=out).add_(0.0)
    else:
        out.copy_(mask * w).add_(0.0)
