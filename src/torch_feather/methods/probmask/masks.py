"""Methods that learn the probability of each weight to be kept, through random soft masks.

The network sees u = w m with a mask m in (0, 1) that is drawn anew for each step: between steps
the parameters hold what the next step trains. From the last phase on the mask is frozen at the
round((1 - s) N) most probable weights, and u = w m is exactly sparse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ... import devices
from ...errors import ConfigurationError, warn
from ...selection import select
from ...weights.latent import DEVICE_BLOCK, LatentWeights, Numbers, copy_all
from ..base import Rate, Reparametrization, Setting
from ..own_parameters import Adam, write_if
from .projection import project_
from .random_numbers import uniform

# Probabilities keep this distance from 0 and 1 in logits, or the gradient were 0/0 at the start.
MARGIN = 2.0**-21
# Shares of the epochs at which pruning begins and ends.
BEGIN, END = 0.16, 0.6
# Weights for which masks are drawn together on the CPU.
BLOCK = 1 << 18


@dataclass(frozen=True)
class ProbabilisticMethod:
    """Learned probabilities of keeping each weight; `repr` is its identity.

    Attributes:
        optimizer: how the probabilities step; its rate falls to 0 as a cosine over the epochs.
        epochs: in which temperature, sparsity and rate change; they fill the steps before the
            last phase.
        finetune: share of the steps in the last phase.
        passes: forward and backward passes per step, each with a mask of its own.
        seed: of the masks.
    """

    optimizer: Adam
    epochs: int
    finetune: float
    passes: int
    seed: int

    def __post_init__(self) -> None:
        if not self.epochs >= 2 or not 0 <= self.finetune < 1 or not self.passes >= 1:
            raise ConfigurationError(
                "epochs must be at least 2, finetune a share of the steps in [0, 1) and passes at "
                f"least 1, got epochs={self.epochs!r}, finetune={self.finetune!r}, "
                f"passes={self.passes!r}."
            )

    def attach(self, setting: Setting) -> ProbabilisticMasks:
        """Puts the method to work."""
        return ProbabilisticMasks(setting, self)


class ProbabilisticMasks(Reparametrization):
    """A `ProbabilisticMethod` at work."""

    completes = True
    pulls_back = True

    def __init__(self, setting: Setting, method: ProbabilisticMethod):
        super().__init__(setting)
        self.method, self.passes = method, method.passes
        self.arrival = max(1, setting.total_steps - round(method.finetune * setting.total_steps))
        weights = setting.weights
        self._pruned = round(setting.sparsity * weights.size)
        self._probability, self._mean, self._square, self._mask = (
            weights.numbers(0.0) for _ in range(4)
        )
        self._probability.flat.fill_(1.0)
        self._draws = torch.zeros(len(weights.views), dtype=torch.int64, device=weights.device)
        self._sharpness = torch.ones((), dtype=torch.float64, device=weights.device)
        self._name_state()
        self.learned = ("probability",)
        self._gradient: Numbers | None = None
        self._size_left: Tensor | None = None
        self._told = False  # that passes were asked for, and not taken

    def _name_state(self) -> None:
        self.state = {
            "probability": self._probability.views,
            "mean": self._mean.views,
            "square": self._square.views,
            "draws": self._draws,
        }

    @property
    def identity(self) -> str:
        """See `Reparametrization`."""
        return repr(self.method)

    # Schedules, by epochs as published

    def _epoch(self, step: Tensor) -> Tensor:
        epoch = (step * self.method.epochs).div(self.arrival, rounding_mode="floor")
        return epoch.clamp(max=self.method.epochs).double()

    def _sharpness_in(self, epoch: Tensor) -> Tensor:
        """The inverse temperature T, from 1 to about 30."""
        return 1 / (0.97 * (1 - epoch / self.method.epochs) + 0.03)

    def _budget_in(self, epoch: Tensor, size: int) -> Tensor:
        """How many of `size` weights may be kept."""
        begin, end = (math.floor(share * self.method.epochs) for share in (BEGIN, END))
        left = (1 - (epoch - begin) / (end - begin)).clamp(0, 1) ** 3
        return size - self._pruned * (1 - left)

    # What the network sees

    def refresh(self, weights: LatentWeights, step: Tensor) -> None:
        """See `Reparametrization`."""
        self._sharpness.copy_(self._sharpness_in(self._epoch(step)))
        frozen = step >= self.arrival
        if devices.synchronizes(weights.device):
            self._draw(weights.size, DEVICE_BLOCK)
            exact = self._most_probable(step)
            self._mask.flat.copy_(torch.where(frozen, exact, self._mask.flat))
        elif frozen:
            self._mask.flat.copy_(self._most_probable(step))
        else:
            self._draw(weights.size, BLOCK)

    def _draw(self, size: int, block: int) -> None:
        """Mask = sigmoid(T (logit(pi) + logistic noise)), with one logarithm for both logits."""
        for a in range(0, size, block):
            mask = self._mask.flat[a : a + block]
            place = self._draws[0] * size + a
            u = uniform(self.method.seed, place, mask.numel(), mask.dtype)
            p = _inside(self._probability.flat[a : a + block])
            odds = (p * u).div_((1 - p).mul_(1 - u))
            torch.sigmoid(odds.log_().mul_(self._sharpness), out=mask)

    def _most_probable(self, step: Tensor) -> Tensor:
        """Mask of all but the least probable, exactly as many as the target asks for.

        Many probabilities are 0 or 1: which of equal ones are pruned is drawn, at places of the
        sequence before all that masks are drawn from.
        """
        scores, k = self._probability.flat, torch.full_like(step, self._pruned)
        last = select(scores.clone, k).value
        lots = uniform(self.method.seed, -torch.full_like(step, scores.numel()), scores.numel(),
                       scores.dtype)  # fmt: skip
        lots.masked_fill_(scores < last, 0.0).masked_fill_(scores > last, 1.0)
        return (~select(lots.clone, k).pruned(lots)).to(scores.dtype)

    def images(self, weights: LatentWeights) -> tuple[list[Tensor], Tensor]:
        """See `Reparametrization`."""
        flats = []
        total = torch.zeros((), dtype=weights.wide, device=weights.device)
        for w, part in _parts(weights):
            # Adding 0 turns -0 into 0.
            u = (self._mask.flat[part] * w).to(w.dtype).add_(0.0)
            flats.append(u)
            total += u.sum(dtype=weights.wide)
        return weights.like(flats).views, total

    def images_of(self, weights: LatentWeights, step: Tensor) -> list[Tensor]:
        """See `Reparametrization`."""
        return self.images(weights)[0]

    def pruned(self, weights: LatentWeights, i: int) -> Tensor:
        """Sharp masks vanish in rounding, and images: what counts is that the network has a 0."""
        w, mask = weights.views[i], self._mask.views[i]
        return (mask == 0) | (((mask * w).to(w.dtype) == 0) & (w != 0))

    def own_counts_pruned(self, weights: LatentWeights) -> Tensor:
        """How many a mask prunes on average that keeps each weight with its probability."""
        counts = [(1 - p).sum(dtype=torch.float64).round() for p in self._probability.views]
        return torch.stack(counts).long()

    def threshold(self, weights: LatentWeights, i: int) -> Tensor:
        """No magnitude decides: 0."""
        return torch.zeros((), dtype=weights.wide, device=weights.device)

    # Gradients

    def pull_back(self, weights: LatentWeights, i: int, gradient: Tensor, image: Tensor) -> Tensor:
        """dL/dw = g m."""
        return (gradient * self._mask.views[i]).to(gradient.dtype)

    def complete(
        self, weights: LatentWeights, parameters: Sequence[nn.Parameter], scale: Tensor | None
    ) -> None:
        """dL/dpi of the passes that were left is there; else that of the only one is added."""
        if self._size_left is None:
            if self.passes > 1 and not self._told:
                self._told = True
                warn(
                    f"passes={self.passes} is asked for, but this step took one: let its forward "
                    "and backward pass run in `for share in sparsifier.passes():`."
                )
            self._collect(weights, parameters, 1.0)
        assert self._gradient is not None
        if self._size_left is not None:
            # The gradients may have been divided since, by GradScaler.unscale_.
            now = _total_size(parameters)
            self._gradient.flat.mul_(torch.where(self._size_left > 0, now / self._size_left, 1.0))
        if scale is not None:
            self._gradient.flat.div_(scale)
        # Where gradients overflowed, GradScaler skips the optimizer of those weights, and no other.
        self._gradient.flat.nan_to_num_(0.0, 0.0, 0.0)

    def leave_pass(self, weights: LatentWeights, parameters: Sequence[nn.Parameter]) -> None:
        """See `Reparametrization`."""
        self._collect(weights, parameters, 1.0)
        self._size_left = _total_size(parameters)

    def enter_pass(
        self, weights: LatentWeights, parameters: Sequence[nn.Parameter], step: Tensor
    ) -> None:
        """What the gradients hold so far was collected with the old mask, not with the new one."""
        self._draws += 1
        self.refresh(weights, step)
        self._collect(weights, parameters, -1.0)
        self._size_left = None

    def _collect(
        self, weights: LatentWeights, parameters: Sequence[nn.Parameter], sign: float
    ) -> None:
        """Adds sign dL/dw w T (1 - m) / (pi~ (1 - pi~)) to dL/dpi, with all of dL/dw = g m.

        As du/dpi = w T m (1 - m) / (pi~ (1 - pi~)), by the derivatives of sigmoid and logit.
        """
        found = weights.numbers(0.0)
        pairs = zip(found.views, parameters, strict=True)
        given = [(view, p.grad) for view, p in pairs if p.grad is not None]
        copy_all([view for view, _ in given], [gradient for _, gradient in given])
        for w, part in _parts(weights):
            found.flat[part].mul_(w)
        p = _inside(self._probability.flat)
        found.flat.mul_(1 - self._mask.flat).div_(p * (1 - p)).mul_(sign * self._sharpness)
        if self._gradient is not None:
            self._gradient.flat.add_(found.flat)
            return
        self._gradient = found
        for parameter, gradient in zip(self._probability.views, found.views, strict=True):
            parameter.grad = gradient

    def forget_gradients(self) -> None:
        """See `Reparametrization`."""
        super().forget_gradients()
        self._gradient = self._size_left = None

    # The probabilities' own step

    def advance(
        self, weights: LatentWeights, step: Tensor, rate: Rate, taken: bool | Tensor
    ) -> None:
        """Adam, then the projection onto the budget of the epoch, up to the last phase."""
        self._draws += taken
        learning = step <= self.arrival
        if devices.synchronizes(weights.device):
            taken = learning & taken
        elif not learning:
            return
        if self._gradient is None or taken is False:
            return
        own = [self._probability.flat, self._mean.flat, self._square.flat]
        new = own if taken is True else [tensor.clone() for tensor in own]
        epoch = self._epoch(step - 1)
        factor = (1 + torch.cos(epoch * (math.pi / self.method.epochs))) / 2
        p, mean, square = new
        self.method.optimizer.step(self._gradient.flat, p, mean, square, step, factor)
        project_(p, self._budget_in(epoch, weights.size))
        if taken is not True:
            write_if(taken, own, new)

    def move(self, weights: LatentWeights) -> None:
        """See `Reparametrization`."""
        self.forget_gradients()
        before = self._probability, self._mean, self._square
        self._probability, self._mean, self._square, self._mask = (
            weights.numbers(0.0) for _ in range(4)
        )
        for old, new in zip(before, (self._probability, self._mean, self._square), strict=True):
            for source, target in zip(old.views, new.views, strict=True):
                target.copy_(source)
        self._draws = self._draws.to(weights.device)
        self._sharpness = self._sharpness.to(weights.device)
        self._name_state()


def _inside(p: Tensor) -> Tensor:
    return p.clamp(MARGIN, 1 - MARGIN)


def _parts(weights: LatentWeights) -> Iterator[tuple[Tensor, slice]]:
    """The weights of each type, and where they stand in the flat order."""
    start = 0
    for flat in weights.flats:
        yield flat, slice(start, start + flat.numel())
        start += flat.numel()


def _total_size(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Sum of |dL/dw|."""
    gradients = [p.grad.abs().sum(dtype=torch.float64) for p in parameters if p.grad is not None]
    return torch.stack(gradients).sum() if gradients else torch.zeros(())
