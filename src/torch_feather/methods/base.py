"""What a method is: the contract between the engine and everything that prunes.

A method comes in two steps. A frozen description, such as `feather(...)`, has `bind(context)`; it
returns a `BoundMethod`, the method on one model. In one step the engine calls, in this order:

    pull_back            for each new gradient, elementwise: dL/du becomes dL/dw
    complete             once, when all gradients are there: what needs sums over them
    (the optimizer steps)
    after_step           own parameters step; latent weights may be changed
    update               thresholds or masks of the new latent weights
    effective_weights    u = R(w)

`update` returns a value, the *pruning* of the step, which the engine passes to all other calls.
`update` and `effective_weights` depend on nothing but their arguments and `state`, so the engine
can apply them to other weights too, such as an average. Everything that outlives a step is in
`state`, in fixed tensors that are written in place: a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..context import MethodContext
from ..errors import ConfigurationError
from ..weights.latent import LatentWeights, PerTensor

Rate = float | Tensor | None
"""The optimizer's present learning rate; None if it has none."""

Gradients = Sequence[Tensor | None]
"""dL/dw of each weight tensor, its local shard; None without a gradient."""

Pruning = Any
"""What `update` returns: masks, thresholds or both, as tensors in tuples, lists and objects with
`tensors()`. The engine looks at the tensors alone, to keep them in fixed memory."""


@dataclass(frozen=True)
class Facts:
    """What the engine has to know of a bound method.

    Attributes:
        pulls_back: `pull_back` changes gradients.
        completes: `complete` has something to add.
        learned: names of the entries of `state` that are parameters of the method.
        follows_lr: they step at a multiple of the optimizer's learning rate.
        clips_own: their gradients belong in a norm that is clipped over all gradients.
        random: the entry of `state` that counts draws of random numbers; the engine advances it by
            1 after each pass and each step.
        passes: forward and backward passes per step, each with random numbers of its own.
        exact: exactly round(s N) weights are zero from `target_step` on.
        on_shards: works if the weights are sharded over processes.
    """

    pulls_back: bool = False
    completes: bool = False
    learned: tuple[str, ...] = ()
    follows_lr: bool = False
    clips_own: bool = True
    random: str | None = None
    passes: int = 1
    exact: bool = True
    on_shards: bool = False


@dataclass(frozen=True)
class Completion:
    """What `complete` returns.

    Attributes:
        terms: added to dL/dw of each weight tensor; None for nothing.
        own: gradients of the method's own parameters, by name of the learned entry.
    """

    terms: Gradients | None = None
    own: Mapping[str, PerTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What a method says of the network that it made, beyond the count of zeros.

    Attributes:
        learned_counts: pruned weights of each tensor, int64, without the final exact-count
            pruning; None if there is none.
        violation: a promise beside the sparsity that is not kept, as the end of a sentence.
    """

    learned_counts: Tensor | None = None
    violation: str | None = None


class BoundMethod(ABC):
    """A method on one model. Subclasses define the effective weights of latent weights.

    The defaults serve a method whose pruning is one boolean mask per weight tensor, True for kept
    weights. Such a method overrides `fingerprint` and `update`, and sets `target_step`.

    If the weights are sharded, all arguments are the local shards. Sum over processes with
    `weights.total` and `weights.common`.

    Attributes:
        facts: what the engine has to know.
        target_step: the step from which on the sparsity is the final one.
        state: everything that cannot be computed again, by name. Checkpoints hold it bit for bit.

    Args:
        context: the model, its weights, the target.

    Example:
        >>> from torch import nn
        >>> class Random(BoundMethod):  # a fixed random mask
        ...     facts = Facts(exact=False)
        ...     target_step = 0
        ...     fingerprint = "random"
        ...     def update(self, weights, step):
        ...         generator = torch.Generator().manual_seed(0)
        ...         return [torch.rand(w.shape, generator=generator) < 0.5 for w in weights.views]
        >>> weights = LatentWeights([torch.ones(4)])
        >>> method = Random(MethodContext(nn.Linear(1, 1), ["w"], weights, 0.5, 10))
        >>> masks = method.update(weights, torch.tensor(0))
        >>> method.effective_weights(weights, masks)[0].shape
        torch.Size([4])
    """

    facts = Facts()
    target_step: int

    def __init__(self, context: MethodContext):
        self.sparsity = context.sparsity
        self.total_steps = context.total_steps
        self.state: dict[str, PerTensor] = {}

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Text that differs between methods and between their options; hashed in checkpoints."""

    @abstractmethod
    def update(self, weights: LatentWeights, step: Tensor) -> Pruning:
        """Return the pruning of these latent weights after `step` steps.

        Args:
            weights: the latent weights w.
            step: 0-dimensional int64. The host does not read it if `devices.synchronizes`.
        """

    def effective_weights(self, weights: LatentWeights, pruning: Pruning) -> list[Tensor]:
        """Return u of each weight tensor, as new tensors in its shape and layout."""
        pairs = zip(weights.views, pruning, strict=True)
        return [torch.where(kept, w, torch.zeros_like(w)) for w, kept in pairs]

    def pruned(self, weights: LatentWeights, pruning: Pruning, i: int) -> Tensor:
        """Return the mask of the pruned weights of tensor i, in its shape."""
        return ~pruning[i]

    def threshold(self, weights: LatentWeights, pruning: Pruning, i: int) -> Tensor:
        """Return the magnitude up to which weights of tensor i are pruned, 0-dimensional."""
        return torch.zeros((), dtype=weights.wide, device=weights.device)

    def pull_back(
        self, weights: LatentWeights, pruning: Pruning, i: int, gradient: Tensor, effective: Tensor
    ) -> Tensor:
        """Return the elementwise part of dL/dw of tensor i, linear in the gradient.

        Args:
            weights: the latent weights w.
            pruning: of this step.
            i: position of the weight tensor.
            gradient: dL/du.
            effective: u.
        """
        return gradient

    def complete(
        self,
        weights: LatentWeights,
        pruning: Pruning,
        gradients: Gradients,
        effective: Sequence[Tensor],
        scale: Tensor | None,
    ) -> Completion:
        """Return what needs all gradients of a step: cross terms, gradients of own parameters.

        Args:
            weights: the latent weights w.
            pruning: of this step.
            gradients: the results of `pull_back`, accumulated.
            effective: u of each tensor.
            scale: loss scale that `gradients` still contain, 0-dimensional; None for 1. Gradients of
                own parameters are returned without it, penalties included.
        """
        return Completion()

    def after_step(
        self,
        weights: LatentWeights,
        pruning: Pruning,
        gradients: Gradients,
        step: Tensor,
        lr: Rate,
        taken: bool | Tensor,
    ) -> None:
        """Step the method's own parameters, and change latent weights in place if wanted.

        Called after the optimizer's step and before `update`. Own parameters have their `.grad`.

        Args:
            weights: the latent weights after the step, which may be written (`weights.views`).
            pruning: the pruning that the gradients belong to.
            gradients: dL/dw, as the optimizer saw them.
            step: optimizer steps taken, this one included.
            lr: the optimizer's learning rate.
            taken: whether the step was taken; a tensor if only the device knows. Then gradients may
                be infinite or NaN, and nothing may change unless it is True (see `write_if`).
        """

    def summary(self, weights: LatentWeights, pruning: Pruning) -> Summary:
        """Return what the method says of the network beyond the count of zeros."""
        return Summary()


class AnyMethod(Protocol):
    """A description of a method: what `sparsify` takes as `method`."""

    def bind(self, context: MethodContext) -> BoundMethod:
        """Return the method on one model.

        Raises:
            ConfigurationError: it does not fit; the message says why and what to do.
        """


def no_learning_rate() -> ConfigurationError:
    """Return the error for an optimizer without a learning rate to follow."""
    return ConfigurationError(
        "The optimizer has no learning rate (lr), which the method's own parameters follow. Give "
        "its parameter groups an 'lr', or use a method without learned thresholds."
    )
