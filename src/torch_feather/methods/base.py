"""What the engine asks of a method at work: u = R(w), and how gradients come back through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..weights.latent import LatentWeights

Rate = float | Tensor | None
"""The optimizer's learning rate now; None where it has none."""


@dataclass(frozen=True)
class Setting:
    """Where a method is put to work: the model, its prunable weights by position, the target."""

    model: nn.Module
    names: Sequence[str]
    weights: LatentWeights
    sparsity: float
    total_steps: int


class Reparametrization(ABC):
    """A method at work on one model. Subclasses say what the network sees of latent weights.

    In one step the engine calls, in this order: `pull_back` for each gradient that arrives,
    `complete` once all are there, then (the optimizer has stepped) `advance`, `refresh`, `images`.

    All that outlives a step lies in fixed tensors on the device of the weights, which are written
    in place, and nothing in a step is read by the host where `devices.synchronizes` the device:
    then a step may be replayed as a captured graph. `refresh` and `images` depend on nothing but their
    arguments and the state, so random numbers are drawn in `advance` and kept in the state.

    Attributes:
        state: what cannot be computed anew, by name: checkpoints hold it bit by bit, and it moves
            with the weights, numbers with a point as their `wide` type. Entry i, along the first
            dimension or in the list, belongs to weight tensor i.
        learned: the names of those entries of `state` that are parameters of the method.
        completes: whether `complete` has anything to do.
        pulls_back: whether dL/dw, as far as a hook can say, differs from dL/du.
        passes: how many passes with random numbers of their own a step wants, see `enter_pass`.
        follows_rate: whether its parameters step at a multiple of the optimizer's learning rate.
        clips_own: whether a recipe that clips the norm of all gradients means its parameters' too.
        arrival: optimizer steps from which on the network is as sparse as in the end.
        exact: whether exactly round(s N) weights are zero from then on.
        on_shards: whether it works where the weights are spread over processes: then `weights` and
            parameters are what is here, and all that belongs to the whole is summed over them.
    """

    on_shards = False
    completes = False
    pulls_back = False
    passes = 1
    follows_rate = False
    clips_own = True
    exact = True
    arrival: int

    def __init__(self, setting: Setting):
        self.sparsity = setting.sparsity
        self.state: dict[str, Tensor | list[Tensor]] = {}
        self.learned: tuple[str, ...] = ()

    # What the network sees

    @property
    @abstractmethod
    def identity(self) -> str:
        """Tells this method and its options from others, in checkpoints."""

    def reached(self, step: int) -> bool:
        """Whether the network is as sparse after `step` steps as in the end."""
        return step >= self.arrival

    @abstractmethod
    def refresh(self, weights: LatentWeights, step: Tensor) -> None:
        """Thresholds or masks become those of these latent weights after `step` steps."""

    @abstractmethod
    def images(self, weights: LatentWeights) -> tuple[list[Tensor], Tensor]:
        """u of each weight tensor, new tensors laid out like them, and their sum.

        At the thresholds or masks of the last `refresh`. The sum (0-dimensional) is not finite if
        a weight is NaN.
        """

    @abstractmethod
    def images_of(self, weights: LatentWeights, step: Tensor) -> list[Tensor]:
        """u of other latent weights, laid out like the model's, without touching any state."""

    def admits(self, weights: LatentWeights, step: Tensor) -> bool:
        """Whether the zeros among these weights, as many as are due, are where it may put them."""
        return True

    @abstractmethod
    def pruned(self, weights: LatentWeights, i: int) -> Tensor:
        """Mask of the pruned weights of tensor i, shaped like it."""

    def counts_pruned(self, weights: LatentWeights) -> Tensor:
        """Pruned weights of each tensor, int64."""
        counts = [self.pruned(weights, i).sum() for i in range(len(weights.views))]
        return weights.total(torch.stack(counts))

    def own_counts_pruned(self, weights: LatentWeights) -> Tensor:
        """What the method prunes by itself, without the last step that makes the count exact."""
        return self.counts_pruned(weights)

    def broken(self, weights: LatentWeights) -> Tensor | None:
        """For which tensors what was learned is not finite, so that they cannot be pruned.

        A mask with an entry for each; None where a method learns nothing that could become so
        without the image being NaN.
        """
        return None

    def excess(self, weights: LatentWeights) -> str | None:
        """What was promised of the end beside the sparsity and is not kept, for a warning."""
        return None

    @abstractmethod
    def threshold(self, weights: LatentWeights, i: int) -> Tensor:
        """The magnitude up to which weights of tensor i are pruned, 0-dimensional."""

    # How gradients come back

    def pull_back(self, weights: LatentWeights, i: int, gradient: Tensor, image: Tensor) -> Tensor:
        """What is elementwise of dL/dw, given dL/du and u of tensor i; linear in the gradient."""
        return gradient

    def complete(
        self, weights: LatentWeights, parameters: Sequence[nn.Parameter], scale: Tensor | None
    ) -> None:
        """Adds what needs all gradients of a step, once they are there.

        Cross terms are added to `parameter.grad`, in place; the method's own parameters get their
        `.grad`, penalties included.

        Args:
            weights: the latent weights w.
            parameters: hold u, and in `.grad` (None: no gradient) what `pull_back` made.
            scale: factor on these gradients that a fused optimizer is yet to divide by, 0-dim.
                The gradients of the method's own parameters come without it.
        """

    def leave_pass(self, weights: LatentWeights, parameters: Sequence[nn.Parameter]) -> None:
        """A forward and backward pass, one of several in this step, is over; as `complete`.

        Until the last one is left, nothing rescales the gradients; before `complete` it may.
        """

    def enter_pass(
        self, weights: LatentWeights, parameters: Sequence[nn.Parameter], step: Tensor
    ) -> None:
        """Another pass of the same step begins: what is random is drawn anew, and refreshed."""

    def advance(
        self, weights: LatentWeights, step: Tensor, rate: Rate, taken: bool | Tensor
    ) -> None:
        """The method's own parameters take their step, after the optimizer has.

        Args:
            weights: the latent weights, stepped.
            step: optimizer steps taken, this one included.
            rate: the optimizer's learning rate.
            taken: whether the step was taken; a tensor where only the device knows (gradients
                may then be infinite or NaN, and must leave no trace).
        """

    # The method's own parameters

    def parameters(self) -> list[Tensor]:
        """Those entries of the state that are learned."""
        found: list[Tensor] = []
        for name in self.learned:
            entry = self.state[name]
            found += [entry] if isinstance(entry, Tensor) else entry
        return found

    def forget_gradients(self) -> None:
        """The gradients of the method's own parameters are void."""
        for parameter in self.parameters():
            parameter.grad = None

    def move(self, weights: LatentWeights) -> None:
        """The weights are now these, on another device or of another type."""

        def moved(entry: Tensor) -> Tensor:
            return entry.to(weights.device, weights.wide if entry.is_floating_point() else None)

        for name, entry in self.state.items():
            if isinstance(entry, Tensor):
                self.state[name] = moved(entry)
            else:
                self.state[name] = [moved(tensor) for tensor in entry]
