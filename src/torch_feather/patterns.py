"""Patterns: weights that are pruned in blocks, or n of each m neighbours kept.

A pattern divides the weights into units and gives each unit a score; the allocation prunes units as
it would prune weights. Dimension 0 of a weight holds outputs and dimension 1 inputs, as in linear
layers and convolutions. Each kernel position is treated on its own.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from .errors import ConfigurationError
from .operators import Operator


class Pattern(ABC):
    """Divides weights into units; its `repr` is part of a method's fingerprint.

    Example:
        >>> pattern: Pattern = Block(1, 2)
        >>> pattern.scores(torch.tensor([[3.0, 4.0, 1.0, 1.0]])).square()
        tensor([[12.5000,  1.0000]])
        >>> pattern.expand(torch.tensor([[False, True]])).tolist()
        [[False, False, True, True]]
    """

    @property
    @abstractmethod
    def multiples(self) -> tuple[int, int]:
        """Numbers that dimensions 0 and 1 of a weight must be multiples of."""

    @abstractmethod
    def zeros(self, sparsity: float, size: int) -> int:
        """Return how many of `size` weights are pruned for a target.

        Args:
            sparsity: target fraction of zeros.
            size: number of weights.

        Raises:
            ConfigurationError: the pattern has another sparsity.
        """

    @abstractmethod
    def scores(self, w: Tensor) -> Tensor:
        """Return the score of each unit, >= 0; NaN for a unit that is never pruned.

        Args:
            w: latent weights, float32 or float64.
        """

    @abstractmethod
    def expand(self, units: Tensor) -> Tensor:
        """Return a value per weight, given a value per unit."""

    @abstractmethod
    def effective_weights(
        self, w: Tensor, scores: Tensor, pruned: Tensor, tau: Tensor, operator: Operator
    ) -> Tensor:
        """Return the effective weights of kept units, and any value for pruned ones.

        Args:
            w: latent weights, float32 or float64.
            scores, pruned: score and mask of their units.
            tau: the threshold of scores, 0-dimensional; scores of kept units are larger.
            operator: the effective value of a number above a threshold.
        """


@dataclass(frozen=True)
class NM(Pattern):
    """Keeps the `n` largest of each `m` neighbours along dimension 1 (inputs).

    Before the target is reached, the candidates with the smallest magnitudes of the network are
    pruned. The operator's threshold in each group of m is the largest magnitude pruned in it.

    `torch.sparse.to_sparse_semi_structured` accepts `NM(2, 4)` for linear layers.

    Source: Mishra et al., Accelerating Sparse Deep Neural Networks (2021). Zhou et al., Learning
    N:M Fine-grained Structured Sparse Neural Networks from Scratch (ICLR 2021), train with the hard
    operator and a straight-through gradient. Other operators and the schedule are additions of this
    package.

    Attributes:
        n: weights kept per group.
        m: weights per group.

    Raises:
        ConfigurationError: not 1 <= n < m <= 64.

    Example:
        >>> NM(2, 4).zeros(0.5, 16)
        8
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
        return 1, self.m

    def zeros(self, sparsity: float, size: int) -> int:
        fraction = (self.m - self.n) / self.m
        if abs(sparsity - fraction) * size > 0.5:
            raise ConfigurationError(
                f"{self.n}:{self.m} prunes exactly {fraction:.6g} of the weights, but sparsity is "
                f"{sparsity:.6g}. Set sparsity={fraction:.6g}, and exclude layers that must stay "
                "dense (exclude=)."
            )
        return round(fraction * size)

    def scores(self, w: Tensor) -> Tensor:
        # Only the m - n smallest of each group may be pruned.
        magnitudes = w.abs()
        # As integers, magnitudes have the same order, and NaN is the largest.
        codes = self._groups(magnitudes.view(getattr(torch, f"int{8 * w.element_size()}")))
        ranks = [torch.zeros_like(codes.select(2, 0), dtype=torch.int8) for _ in range(self.m)]
        for i, j in combinations(range(self.m), 2):
            first = codes.select(2, i) <= codes.select(2, j)  # of a tie, the first is pruned
            ranks[j] += first
            ranks[i] += ~first
        kept = torch.stack(ranks, 2) >= self.m - self.n
        return magnitudes.masked_fill(kept.flatten(1, 2), torch.nan)

    def expand(self, units: Tensor) -> Tensor:
        return units

    def effective_weights(
        self, w: Tensor, scores: Tensor, pruned: Tensor, tau: Tensor, operator: Operator
    ) -> Tensor:
        # If a kept magnitude equals the threshold, the threshold steps below it, as in `Cutoff`.
        magnitudes = w.abs()
        most = self._groups(magnitudes.masked_fill(pruned.logical_not(), 0.0)).amax(2, keepdim=True)
        least = self._groups(magnitudes.masked_fill(pruned, torch.inf)).amin(2, keepdim=True)
        below = torch.nextafter(most, torch.zeros_like(most))
        own = torch.where(least <= most, below, most)
        return operator(self._groups(w), own).flatten(1, 2)

    def _groups(self, x: Tensor) -> Tensor:
        """Return x in shape (outputs, inputs / m, m, ...)."""
        return x.unflatten(1, (-1, self.m))


@dataclass(frozen=True)
class Block(Pattern):
    """Prunes entire blocks of `rows` outputs by `columns` inputs.

    A block's score is the root mean square of its weights; kept blocks are scaled by
    operator(score) / score. With `Hard` that changes nothing; with `Soft` it is the proximal step
    of the group lasso (Yuan and Lin, 2006). Source: Narang et al., Block-Sparse Recurrent Neural
    Networks (2017), who rank by the largest magnitude. Other operators and the straight-through
    gradient are additions of this package.

    Attributes:
        rows: outputs per block.
        columns: inputs per block.

    Raises:
        ConfigurationError: a number is not a positive integer.

    Example:
        >>> Block(4, 4).zeros(0.5, 64)
        32
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
        return self.rows, self.columns

    def zeros(self, sparsity: float, size: int) -> int:
        # The number of entire blocks nearest to the target.
        block = self.rows * self.columns
        return round(sparsity * (size // block)) * block

    def scores(self, w: Tensor) -> Tensor:
        blocks = w.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))
        # Double precision: the square of a float32 neither overflows nor underflows.
        norm = torch.linalg.vector_norm(blocks, dim=(1, 3), dtype=torch.float64)
        return norm.div_(math.sqrt(self.rows * self.columns)).to(w.dtype)

    def expand(self, units: Tensor) -> Tensor:
        return units.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def effective_weights(
        self, w: Tensor, scores: Tensor, pruned: Tensor, tau: Tensor, operator: Operator
    ) -> Tensor:
        factor = operator(scores, tau) / scores
        return w * self.expand(torch.where(factor.isfinite(), factor, 1.0))


def _whole(number: object) -> bool:
    """Return whether an object is an integer >= 1."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def make_pattern(pattern: str | Pattern) -> Pattern:
    """Return a pattern by its text, `N:M` or `ROWSxCOLUMNS`, or the object itself.

    Raises:
        ConfigurationError: other text.

    Example:
        >>> make_pattern("2:4")
        NM(n=2, m=4)
    """
    if isinstance(pattern, Pattern):
        return pattern
    for kind, sign in ((NM, ":"), (Block, "x")):
        numbers = re.fullmatch(rf"(\d+){sign}(\d+)", pattern) if isinstance(pattern, str) else None
        if numbers:
            return kind(*map(int, numbers.groups()))
    raise ConfigurationError(
        f"pattern must be text such as '2:4' (keep 2 of 4 neighbours) or '4x4' (blocks of 4 "
        f"outputs by 4 inputs; quote it in YAML), NM(2, 4) or Block(4, 4); got {pattern!r}."
    )
