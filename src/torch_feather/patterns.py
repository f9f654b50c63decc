"""Patterns: weights that are pruned in blocks, or so many of each few.

A pattern makes units of the weights, and a score for each unit; the allocation prunes units as it
would prune weights. Dimension 0 of a weight are its outputs and dimension 1 its inputs, as in
linear layers and convolutions; what comes after (places in a kernel) is looked at place by place.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import ConfigurationError
from .methods.base import Rate, Setting
from .methods.thresholded import Scheduled
from .operators import Operator
from .weights.latent import LatentWeights, Segment, visible

if TYPE_CHECKING:
    from .methods.magnitude import PatternedMethod


class Pattern(ABC):
    """Which weights make up a unit, and what becomes of kept ones; `repr` is its identity."""

    @property
    @abstractmethod
    def multiples(self) -> tuple[int, int]:
        """What dimensions 0 and 1 of a weight have to be multiples of."""

    @abstractmethod
    def zeros(self, sparsity: float, size: int) -> int:
        """How many of `size` weights are pruned for a target.

        Raises:
            ConfigurationError: the pattern has another.
        """

    @abstractmethod
    def scores(self, w: Tensor) -> Tensor:
        """The score of each unit, >= 0; NaN where it is never pruned.

        Args:
            w: latent weights, float32 or float64.
        """

    @abstractmethod
    def spread(self, units: Tensor) -> Tensor:
        """What is said of units, said of their weights."""

    @abstractmethod
    def image(
        self, w: Tensor, scores: Tensor, pruned: Tensor, tau: Tensor, operator: Operator
    ) -> Tensor:
        """Effective values of the weights of kept units; of others anything.

        Args:
            w: latent weights, float32 or float64.
            scores, pruned: of their units.
            tau: the threshold of scores, 0-dimensional: those of kept units are larger.
            operator: what becomes of a number above a threshold.
        """


@dataclass(frozen=True)
class NM(Pattern):
    """Of each `m` neighbours along dimension 1 (inputs), all but the `n` largest are 0.

    Until the target is reached, those with the smallest magnitudes in the network. The operator's
    threshold is, in each group of m, the largest magnitude that is pruned there.

    `NM(2, 4)` is what `torch.sparse.to_sparse_semi_structured` takes (of linear layers). Source:
    Mishra et al., Accelerating Sparse Deep Neural Networks (2021), and Zhou et al., Learning N:M
    Fine-grained Structured Sparse Neural Networks from Scratch (ICLR 2021), who train with the
    hard operator straight-through; other operators and the way to the target are ours.

    Attributes:
        n: how many are kept.
        m: of how many.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (_whole(self.n) and _whole(self.m) and 1 <= self.n < self.m <= 64):
            raise ConfigurationError(
                f"N:M keeps n of m weights, 1 <= n < m <= 64, such as 2:4; got {self.n!r}:"
                f"{self.m!r}."
            )

    @property
    def multiples(self) -> tuple[int, int]:
        """See `Pattern`."""
        return 1, self.m

    def zeros(self, sparsity: float, size: int) -> int:
        """See `Pattern`."""
        share = (self.m - self.n) / self.m
        if abs(sparsity - share) * size > 0.5:
            raise ConfigurationError(
                f"{self.n}:{self.m} prunes exactly {share:.6g} of the weights, but sparsity asks "
                f"for {sparsity:.6g} of them. Set sparsity={share:.6g}, and leave out the layers "
                "that are to stay dense: exclude=."
            )
        return round(share * size)

    def scores(self, w: Tensor) -> Tensor:
        """See `Pattern`. Only the m - n smallest of each group may be pruned."""
        magnitudes = w.abs()
        # As integers they order alike, and NaN comes last.
        codes = self._groups(magnitudes.view(getattr(torch, f"int{8 * w.element_size()}")))
        ranks = [torch.zeros_like(codes.select(2, 0), dtype=torch.int8) for _ in range(self.m)]
        for i, j in combinations(range(self.m), 2):
            first = codes.select(2, i) <= codes.select(2, j)  # of equal ones, the first is pruned
            ranks[j] += first
            ranks[i] += ~first
        kept = torch.stack(ranks, 2) >= self.m - self.n
        return magnitudes.masked_fill(kept.flatten(1, 2), torch.nan)

    def spread(self, units: Tensor) -> Tensor:
        """See `Pattern`. The units are the weights."""
        return units

    def image(
        self, w: Tensor, scores: Tensor, pruned: Tensor, tau: Tensor, operator: Operator
    ) -> Tensor:
        """See `Pattern`. A threshold as large as a kept magnitude steps below it, as in `Cut`."""
        magnitudes = w.abs()
        most = self._groups(magnitudes.masked_fill(pruned.logical_not(), 0.0)).amax(2, keepdim=True)
        least = self._groups(magnitudes.masked_fill(pruned, torch.inf)).amin(2, keepdim=True)
        below = torch.nextafter(most, torch.zeros_like(most))
        own = torch.where(least <= most, below, most)
        return operator(self._groups(w), own).flatten(1, 2)

    def _groups(self, x: Tensor) -> Tensor:
        """Of shape (outputs, inputs / m, m, ...)."""
        return x.unflatten(1, (-1, self.m))


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `rows` outputs by `columns` inputs are 0 as a whole, or not.

    A block's score is the root mean square of its weights; kept blocks are scaled by
    operator(score) / score. With `Hard` that changes nothing; with `Soft` it is the proximal step
    of the group lasso (Yuan and Lin, 2006). Pruning whole blocks: Narang et al., Block-Sparse
    Recurrent Neural Networks (2017), who rank by the largest magnitude; blocks with other
    operators, and with a gradient that passes straight through, are ours.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if not (_whole(self.rows) and _whole(self.columns) and self.rows * self.columns >= 1):
            raise ConfigurationError(
                f"A block has at least one row and one column, such as 4x4 or 16x1; got "
                f"{self.rows!r}x{self.columns!r}."
            )

    @property
    def multiples(self) -> tuple[int, int]:
        """See `Pattern`."""
        return self.rows, self.columns

    def zeros(self, sparsity: float, size: int) -> int:
        """See `Pattern`. As many whole blocks as come nearest to the target."""
        block = self.rows * self.columns
        return round(sparsity * (size // block)) * block

    def scores(self, w: Tensor) -> Tensor:
        """See `Pattern`."""
        blocks = w.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))
        # In double precision no square is too large or too small.
        norm = torch.linalg.vector_norm(blocks, dim=(1, 3), dtype=torch.float64)
        return norm.div_(math.sqrt(self.rows * self.columns)).to(w.dtype)

    def spread(self, units: Tensor) -> Tensor:
        """See `Pattern`."""
        return units.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def image(
        self, w: Tensor, scores: Tensor, pruned: Tensor, tau: Tensor, operator: Operator
    ) -> Tensor:
        """See `Pattern`."""
        factor = operator(scores, tau) / scores
        return w * self.spread(torch.where(factor.isfinite(), factor, 1.0))


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def make_pattern(pattern: str | Pattern) -> Pattern:
    """A pattern by its text, `N:M` or `ROWSxCOLUMNS`, or the object itself."""
    if isinstance(pattern, Pattern):
        return pattern
    for kind, sign in ((NM, ":"), (Block, "x")):
        numbers = re.fullmatch(rf"(\d+){sign}(\d+)", pattern) if isinstance(pattern, str) else None
        if numbers:
            return kind(*map(int, numbers.groups()))
    raise ConfigurationError(
        f"pattern is a text such as '2:4' (2 of 4 neighbours are kept) or '4x4' (blocks of 4 "
        f"outputs by 4 inputs; in YAML in quotes), or NM(2, 4) or Block(4, 4); got {pattern!r}."
    )


class Patterned(Scheduled):
    """A `PatternedMethod` at work: the allocation cuts through the scores of units.

    It sees a network that has units for weights.
    """

    on_shards = False  # a block may lie in two shards

    def __init__(self, setting: Setting, method: PatternedMethod):
        self.pattern = method.pattern
        shapes = setting.weights.shapes
        _check(self.pattern, setting.names, shapes)
        self.scores = LatentWeights(self._scores(setting.weights))
        super().__init__(replace(setting, weights=self.scores), method)
        if isinstance(self.pattern, NM):
            self._check_alike(setting.sparsity)

    def _check_alike(self, sparsity: float) -> None:
        """Raises ConfigurationError for an N:M pattern whose layers are not to end up alike."""
        end = torch.tensor(sparsity, dtype=torch.float64, device=self.scores.device)
        pruned = self.scores.counts_pruned(self.allocation.cuts(self.scores, end)).tolist()
        sizes = self.scores.sizes.tolist()
        if any(k != self.pattern.zeros(sparsity, n) for k, n in zip(pruned, sizes, strict=True)):
            raise ConfigurationError(
                f"{self.pattern!r} prunes the same share of every layer, but allocation="
                f"{self.method.allocation!r} wants layers to differ. Use allocation='global' or "
                "'uniform', and leave out layers that are to stay dense: exclude=."
            )

    @property
    def identity(self) -> str:
        """See `Reparametrization`."""
        return f"{super().identity} {self.pattern!r}"

    def _scores(self, weights: LatentWeights) -> list[Tensor]:
        return [self.pattern.scores(w.to(weights.wide)).contiguous() for w in weights.views]

    def _rescore(self, weights: LatentWeights) -> None:
        for old, w in zip(self.scores.views, weights.views, strict=True):
            old.copy_(self.pattern.scores(w.to(weights.wide)))

    def advance(
        self, weights: LatentWeights, step: Tensor, rate: Rate, taken: bool | Tensor
    ) -> None:
        """See `Reparametrization`."""
        if self.allocation.follows:
            self._rescore(weights)
            super().advance(self.scores, step, rate, taken)

    def refresh(self, weights: LatentWeights, step: Tensor) -> None:
        """See `Reparametrization`."""
        self._rescore(weights)
        super().refresh(self.scores, step)

    def images(self, weights: LatentWeights) -> tuple[list[Tensor], Tensor]:
        """See `Reparametrization`."""
        images = self._images(weights, self.scores, self.segments)
        return images, torch.stack([u.sum(dtype=weights.wide) for u in images]).sum()

    def images_of(self, weights: LatentWeights, step: Tensor) -> list[Tensor]:
        """See `Reparametrization`."""
        scores = LatentWeights(self._scores(weights))
        return self._images(weights, scores, self.cuts(scores, step))

    def _images(
        self, weights: LatentWeights, scores: LatentWeights, segments: Sequence[Segment]
    ) -> list[Tensor]:
        images = []
        for i, w in enumerate(weights.views):
            wide, pruned = w.to(weights.wide), scores.pruned(i, segments)
            if not self.operator.is_identity:
                tau = scores.segment_of(i, segments).threshold
                wide = self.pattern.image(wide, scores.views[i], pruned, tau, self.operator)
            image = visible(wide.to(w.dtype), w).masked_fill(self.pattern.spread(pruned), 0.0)
            images.append(torch.empty_like(w).copy_(image))  # laid out like w
        return images

    def admits(self, weights: LatentWeights, step: Tensor) -> bool:
        """See `Reparametrization`."""
        pairs = zip(weights.views, self.images_of(weights, step), strict=True)
        return all(torch.equal(w == 0, u == 0) for w, u in pairs)

    def pruned(self, weights: LatentWeights, i: int) -> Tensor:
        """See `Reparametrization`."""
        return self.pattern.spread(self.scores.pruned(i, self.segments))

    def threshold(self, weights: LatentWeights, i: int) -> Tensor:
        """See `Reparametrization`. The score up to which units are pruned."""
        return super().threshold(self.scores, i)

    def pull_back(self, weights: LatentWeights, i: int, gradient: Tensor, image: Tensor) -> Tensor:
        """See `Reparametrization`. What is 0 in a kept unit is kept."""
        return super().pull_back(self.scores, i, gradient, ~self.pruned(weights, i))

    def move(self, weights: LatentWeights) -> None:
        """See `Reparametrization`."""
        super().move(weights)
        self.scores = LatentWeights(self._scores(weights))


def _check(pattern: Pattern, names: Sequence[str], shapes: Sequence[torch.Size]) -> None:
    """Raises ConfigurationError for tensors that the pattern does not divide."""
    rows, columns = pattern.multiples
    unfit = [
        (name, tuple(shape))
        for name, shape in zip(names, shapes, strict=True)
        if len(shape) < 2 or shape[0] % rows or shape[1] % columns
    ]
    if unfit:
        wants = f"dimension 1 a multiple of {columns}"
        if rows > 1:
            wants = f"dimension 0 a multiple of {rows}, " + wants
        listed = ", ".join(f"{name} {shape}" for name, shape in unfit)
        raise ConfigurationError(
            f"{pattern!r} needs weights with {wants}. These are not: {listed}. Leave them out: "
            f"exclude={[name for name, _ in unfit]!r}."
        )
