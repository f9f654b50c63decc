"""The contract between the engine and a method.

A method is made in two steps. A frozen description, such as `feather(...)`, has `bind(context)`; it
returns a `BoundMethod`, the method on one model. In one step the engine calls, in this order:

    pull_back            for each new gradient, elementwise: dL/du becomes dL/dw
    complete             once, when all gradients exist: adds terms with sums over them
    (the optimizer steps)
    latent_update        changes the latent weights elementwise, if the method has one
    after_step           own parameters step; latent weights may be changed
    update               thresholds or masks of the new latent weights
    write_effective      u = R(w)

`update` returns a value, the *pruning* of the step, which the engine passes to all other calls.
`update` and `write_effective` depend on their arguments and `state` alone. So the engine can
apply them to other weights, such as an average. Everything that lasts longer than a step is in
`state`, in fixed tensors that are written in place. So a step can be captured in a CUDA graph.
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
from ..latent_updates import LatentUpdate
from ..weights.latent import LatentWeights, PerTensor

Rate = float | Tensor | None
"""The optimizer's present learning rate; None if it has none."""

Gradients = Sequence[Tensor | None]
"""dL/dw of each weight tensor, its local shard; None without a gradient."""

Pruning = Any
"""The result of `update`: masks, thresholds or both, as tensors in tuples, lists and objects with
`tensors()`. The engine uses the tensors alone, to keep them in fixed memory."""


@dataclass(frozen=True)
class Facts:
    """Facts about a bound method that the engine needs.

    Attributes:
        pulls_back: `pull_back` changes gradients.
        completes: `complete` adds terms or gradients of own parameters.
        learned: names of the entries of `state` that are the method's own parameters.
        follows_lr: own parameters step at a multiple of the optimizer's learning rate.
        clips_own: gradients of own parameters count in a norm that is clipped over all gradients.
        random: the entry of `state` that counts draws of random numbers; the engine advances it by
            1 after each pass and each step.
        stored: fields of the pruning, a NamedTuple, that the engine copies into the entries of
            `state` with the same names after each update of its own weights; None copies nothing.
        absent: entries of `state` that states of version 0.1 do not have, with the values that they
            stand for.
        passes: forward and backward passes per step, each with random numbers of its own.
        exact: exactly round(s N) weights are zero from `target_step` on.
        on_shards: works if the weights are sharded over processes.

    Example:
        >>> Facts(completes=True, learned=("threshold",)).passes
        1
    """

    pulls_back: bool = False
    completes: bool = False
    learned: tuple[str, ...] = ()
    follows_lr: bool = False
    clips_own: bool = True
    random: str | None = None
    stored: tuple[str, ...] = ()
    absent: Mapping[str, PerTensor] = field(default_factory=dict)
    passes: int = 1
    exact: bool = True
    on_shards: bool = False


@dataclass(frozen=True)
class Completion:
    """The result of `complete`.

    Attributes:
        terms: terms to add to dL/dw of each weight tensor; None for no term.
        factors: of the terms, 0-dimensional each; None for 1. Methods so save a pass over them.
        own: gradients of the method's own parameters, by name of the learned entry.

    Example:
        >>> Completion(terms=[torch.ones(2), None]).own
        {}
    """

    terms: Gradients | None = None
    factors: Sequence[Tensor] | None = None
    own: Mapping[str, PerTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """Facts about the pruned network, beyond the count of zeros.

    Attributes:
        learned_counts: number of pruned weights of each tensor, int64, without the final
            exact-count pruning; None if the method has no such pruning.
        violation: a goal other than the sparsity that is not met, as the end of a sentence.

    Example:
        >>> summary = Summary(learned_counts=torch.tensor([90, 45]))
        >>> int(summary.learned_counts.sum()), summary.violation is None
        (135, True)
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
        facts: facts that the engine needs.
        target_step: the step from which on the sparsity is the final one.
        latent_update: elementwise change of the latent weights that the engine applies after each
            step of their optimizer; None for none.
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
        >>> effective_weights(method, weights, masks)[0].shape
        torch.Size([4])
    """

    facts = Facts()
    target_step: int
    latent_update: LatentUpdate | None = None

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
            step: 0-dimensional int64. If `devices.synchronizes`, the host must not read it.
        """

    def write_effective(
        self, weights: LatentWeights, pruning: Pruning, out: Sequence[Tensor]
    ) -> None:
        """Write u of each weight tensor.

        Args:
            weights: the latent weights w.
            pruning: their pruning.
            out: tensors in the shapes and layouts of `weights.views`, to overwrite.
        """
        for w, kept, u in zip(weights.views, pruning, out, strict=True):
            torch.where(kept, w, w.new_zeros(()), out=u)

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
            pruning: the pruning of this step.
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
        """Return cross terms and gradients of own parameters, which need all gradients of a step.

        It changes nothing: it is called again if other code wrote into the parameters meanwhile.

        Args:
            weights: the latent weights w.
            pruning: the pruning of this step.
            gradients: the results of `pull_back`, accumulated.
            effective: u of each tensor.
            scale: loss scale that `gradients` contain, 0-dimensional; None for 1. Gradients of own
                parameters are returned without it, penalties included.
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
        """Step own parameters, or change latent weights in place (a projection, a regrowth).

        Called after the optimizer's step and before `update`. Own parameters have their `.grad`.
        By default nothing changes.

        Args:
            weights: the latent weights after the step, which may be written (`weights.views`).
            pruning: the latest one. With one optimizer, the gradients were computed at it; with
                several, it is of latent weights after the others' steps.
            gradients: dL/dw, as the optimizer saw them.
            step: optimizer steps taken, this one included.
            lr: the optimizer's learning rate, that of the first prunable weight.
            taken: whether the step was taken; a tensor if only the device knows. Gradients may then
                be infinite or NaN, and nothing may change unless it is True (see `write_if`).
        """

    def summary(self, weights: LatentWeights, pruning: Pruning) -> Summary:
        """Return facts about the pruned network, beyond the count of zeros."""
        return Summary()


@torch.no_grad()
def effective_weights(
    method: BoundMethod, weights: LatentWeights, pruning: Pruning
) -> list[Tensor]:
    """Return u of each weight tensor, as new tensors in its shape and layout.

    Example:
        >>> from torch import nn
        >>> from torch_feather.methods import gmp
        >>> weights = LatentWeights([torch.tensor([1.0, 2.0])])
        >>> context = MethodContext(nn.Linear(2, 1), ["weight"], weights, 0.5, 10)
        >>> method = gmp(sparsity=0.5, schedule="constant").bind(context)
        >>> effective_weights(method, weights, method.update(weights, torch.tensor(0)))
        [tensor([0., 2.])]
    """
    out = weights.like([torch.empty_like(flat) for flat in weights.flats]).views
    method.write_effective(weights, pruning, out)
    return out


class AnyMethod(Protocol):
    """The description of a method, which `sparsify` takes as `method`.

    Example:
        >>> from torch_feather.methods import feather
        >>> method: AnyMethod = feather(sparsity=0.9)
        >>> hasattr(method, "bind")
        True
    """

    def bind(self, context: MethodContext) -> BoundMethod:
        """Return the method on one model.

        Raises:
            ConfigurationError: the method does not fit; the message says why and what to do.
        """


def no_learning_rate() -> ConfigurationError:
    """Return the error for an optimizer without a learning rate to follow.

    Example:
        >>> raise no_learning_rate()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        torch_feather.errors.ConfigurationError: The optimizer has no learning rate (lr), ...
    """
    return ConfigurationError(
        "The optimizer has no learning rate (lr), which the method follows. Give its parameter "
        "groups an 'lr', or use a method without learned thresholds and latent updates."
    )
