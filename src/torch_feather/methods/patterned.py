"""Magnitude pruning by a pattern: N:M or blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..context import MethodContext
from ..errors import ConfigurationError
from ..patterns import NM, Pattern
from ..weights.kept import keep_nonzero
from ..weights.latent import LatentWeights, copy_all
from ..weights.passes import count_pruned, pruned_mask
from ..weights.segments import Segment, segment_of
from .base import Gradients, Pruning, Rate
from .magnitude import MagnitudePruning, Method, mark_kept


@dataclass(frozen=True)
class PatternedMethod(Method):
    """A `Method` that prunes by a pattern, such as 2 of 4 neighbours or blocks.

    Example:
        >>> from torch_feather.allocation import Global
        >>> from torch_feather.gradient_rules import Masked
        >>> from torch_feather.operators import Hard
        >>> from torch_feather.schedules import Cubic
        >>> PatternedMethod(Hard(), Masked(), Global(), Cubic(), NM(2, 4)).pattern
        NM(n=2, m=4)
    """

    pattern: Pattern

    def bind(self, context: MethodContext) -> PatternedPruning:
        return PatternedPruning(context, self)


class PatternCutoffs(NamedTuple):
    """The pruning of a method with a pattern.

    Example:
        >>> from torch import nn
        >>> from torch_feather.methods import feather
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 4)])
        >>> context = MethodContext(nn.Linear(4, 4), ["weight"], weights, 0.5, 10)
        >>> bound = feather(sparsity=0.5, pattern="4x2").bind(context)
        >>> bound.update(weights, torch.tensor(10)).scores.size  # blocks
        2
    """

    scores: LatentWeights
    """The scores of the units, as if they were weights."""
    segments: list[Segment]
    """Cover all units once."""
    progress: Tensor
    """Completed fraction of training, 0-dimensional float64."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the pruning."""
        own = [t for s in self.segments for t in (*s.cutoff, s.scale) if t is not None]
        return [*self.scores.flats, *own, self.progress]


class PatternedPruning(MagnitudePruning):
    """A `PatternedMethod` on one model: the allocation finds cutoffs through scores of units.

    Args:
        context: the model, its prunable weights, the target and the number of steps.
        method: the parts of the method.

    Raises:
        ConfigurationError: the pattern does not fit the shape of a weight, or the allocation.

    Example:
        >>> from torch import nn
        >>> from torch_feather.methods import feather
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["weight"], weights, 0.5, 10)
        >>> bound = feather(sparsity=0.5, pattern="2:4").bind(context)
        >>> bound.pruned(weights, bound.update(weights, torch.tensor(10)), 0).tolist()
        [[True, True, False, False]]
    """

    def __init__(self, context: MethodContext, method: PatternedMethod):
        self.pattern = method.pattern
        self._layout: LatentWeights | None = None
        _check(self.pattern, context.names, context.weights.shapes)
        scores = self._scores(context.weights)
        super().__init__(replace(context, weights=scores), method)
        # A block may be divided between two shards.
        self.facts = replace(self.facts, on_shards=False)
        if isinstance(self.pattern, NM):
            self._check_equal(scores, context.sparsity)

    def _check_equal(self, scores: LatentWeights, sparsity: float) -> None:
        """Raise ConfigurationError for an N:M pattern with layers of different final sparsity."""
        end = torch.tensor(sparsity, dtype=torch.float64, device=scores.device)
        cutoffs = self.allocation.cutoffs(scores, end, self._entries())
        counts, sizes = count_pruned(scores, cutoffs).tolist(), scores.sizes.tolist()
        if any(k != self.pattern.zeros(sparsity, n) for k, n in zip(counts, sizes, strict=True)):
            raise ConfigurationError(
                f"{self.pattern!r} gives every layer the same sparsity, but allocation="
                f"{self.method.allocation!r} gives layers different ones. Use allocation='global' "
                "or 'uniform', and exclude layers that must stay dense (exclude=)."
            )

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint} {self.pattern!r}"

    def _scores(self, weights: LatentWeights) -> LatentWeights:
        """Return the scores of the units as if they were weights, in new memory."""
        scores = [self.pattern.scores(w.to(weights.wide)).contiguous() for w in weights.views]
        layout = self._layout
        if layout is None or (layout.device, layout.wide) != (weights.device, weights.wide):
            self._layout = layout = LatentWeights(scores)  # later steps share its constants
        found = layout.like([torch.empty_like(flat) for flat in layout.flats])
        copy_all(found.views, scores)
        return found

    def update(self, weights: LatentWeights, step: Tensor) -> Pruning:
        scores = self._scores(weights)
        return PatternCutoffs(scores, self.cutoffs(scores, step), self.progress(step))

    def write_effective(
        self, weights: LatentWeights, pruning: Pruning, out: Sequence[Tensor]
    ) -> None:
        for i, w in enumerate(weights.views):
            wide, pruned = w.to(weights.wide), self._pruned_units(pruning, i)
            if not self.operator.is_identity:
                tau = segment_of(pruning.scores, pruning.segments, i).threshold
                wide = self.pattern.effective_weights(
                    wide, pruning.scores.views[i], pruned, tau, self.operator
                )
            kept = keep_nonzero(wide.to(w.dtype), w)
            out[i].copy_(kept.masked_fill_(self.pattern.expand(pruned), 0.0))

    def _pruned_units(self, pruning: PatternCutoffs, i: int) -> Tensor:
        """Return the mask of the pruned units of tensor i."""
        return pruned_mask(pruning.scores, pruning.segments, i)

    def pruned(self, weights: LatentWeights, pruning: Pruning, i: int) -> Tensor:
        return self.pattern.expand(self._pruned_units(pruning, i))

    def threshold(self, weights: LatentWeights, pruning: Pruning, i: int) -> Tensor:
        # A score, not a magnitude: units with scores up to it are pruned.
        return segment_of(pruning.scores, pruning.segments, i).threshold

    def pull_back(
        self, weights: LatentWeights, pruning: Pruning, i: int, gradient: Tensor, effective: Tensor
    ) -> Tensor:
        value = segment_of(pruning.scores, pruning.segments, i).cutoff.value
        # A zero in a kept unit is kept.
        marked = mark_kept(effective, ~self.pruned(weights, pruning, i))
        return self.apply_rule(weights.views[i], value, pruning.progress, gradient, marked)

    def after_step(
        self,
        weights: LatentWeights,
        pruning: Pruning,
        gradients: Gradients,
        step: Tensor,
        lr: Rate,
        taken: bool | Tensor,
    ) -> None:
        if self.allocation.follows:
            super().after_step(self._scores(weights), pruning, gradients, step, lr, taken)


def _check(pattern: Pattern, names: Sequence[str], shapes: Sequence[torch.Size]) -> None:
    """Raise ConfigurationError for tensors that the pattern does not divide."""
    rows, columns = pattern.multiples
    unfit = [
        (name, tuple(shape))
        for name, shape in zip(names, shapes, strict=True)
        if len(shape) < 2 or shape[0] % rows or shape[1] % columns
    ]
    if unfit:
        needs = f"dimension 1 a multiple of {columns}"
        if rows > 1:
            needs = f"dimension 0 a multiple of {rows}, " + needs
        listed = ", ".join(f"{name} {shape}" for name, shape in unfit)
        raise ConfigurationError(
            f"{pattern!r} needs weights with {needs}. These do not fit: {listed}. Exclude them: "
            f"exclude={[name for name, _ in unfit]!r}."
        )
