"""Where the model and its optimizers hold the prunable weights, and which of them are supported."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ConfigurationError, StateError, some, warn
from ..latent_updates import LatentUpdate
from ..methods.base import BoundMethod, Rate, no_learning_rate
from ..prunable import Prunable, unwrap
from ..weights.shards import fsdp_units, local, local_all, reshard
from ..weights.updates import PendingUpdate
from .module_path import Path, find_path
from .step_in_backward import in_backward
from .storage import check_storage
from .wrappers import checked, levels_of

# Optimizers and parameters that have a sparsifier; weak references to its `Step`.
attached: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(eq=False)
class BoundWeight:
    """A prunable weight, with its positions in the model and in the optimizers.

    Attributes:
        name: dotted name in the model.
        module: module that holds it.
        attribute: its name in this module.
        parameter: the present parameter, which may be replaced during training.
        optimizer: number of the optimizer that holds it.
        group: number of its parameter group.
        position: position in this group.
        ties: other modules that hold the same parameter, with its names in them.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> weight = BoundWeight("head.weight", layer, "weight", layer.weight, 0, 0, 0)
        >>> weight.local.shape
        torch.Size([1, 2])
    """

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    optimizer: int
    group: int
    position: int
    ties: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def local(self) -> Tensor:
        """The local shard of the parameter; all of it if it is not sharded."""
        return local(self.parameter)


class Binding:
    """The prunable weights of a model, in one or several optimizers.

    Lists of tensors have one entry per weight, in the order of `weights`.

    Attributes:
        weights: the prunable weights.
        optimizers: the optimizers, in the order in which they step.

    Example:
        >>> import torch
        >>> from torch_feather.prunable import find_prunable
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> binding = bind(model, find_prunable(model), optimizer)
        >>> binding.names, binding.learning_rate()
        (['0.weight', '1.weight'], 0.1)
    """

    def __init__(self, weights: Sequence[BoundWeight], optimizers: Sequence[Optimizer]):
        self.weights, self.optimizers = list(weights), list(optimizers)
        self._path: Path | None = None

    @property
    def names(self) -> list[str]:
        """Names of the weights."""
        return [weight.name for weight in self.weights]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters."""
        return [weight.parameter for weight in self.weights]

    @property
    def local(self) -> list[Tensor]:
        """The local shards of the parameters."""
        return local_all(self.parameters)

    @property
    def gradients(self) -> list[Tensor | None]:
        """The local shards of the gradients."""
        return [None if p.grad is None else local(p.grad) for p in self.parameters]

    def held_by(self, optimizer: int) -> list[int]:
        """Return the positions of the weights that an optimizer holds."""
        return [i for i, weight in enumerate(self.weights) if weight.optimizer == optimizer]

    def group(self, i: int) -> dict[str, Any]:
        """Return the parameter group of weight i."""
        weight = self.weights[i]
        return self.optimizers[weight.optimizer].param_groups[weight.group]

    def learning_rate(self, i: int = 0) -> Rate:
        """Return the present learning rate of weight i; None if its group has none."""
        return self.group(i).get("lr")

    def pending(self, update: LatentUpdate, taken: bool | Tensor) -> PendingUpdate:
        """Return a latent update with the present gradients and learning rates.

        Args:
            update: the latent update.
            taken: whether the step was taken; a tensor if only the device knows.

        Raises:
            ConfigurationError: a parameter group has no learning rate.
        """
        rates = [self.learning_rate(i) for i in range(len(self.weights))]
        if any(rate is None for rate in rates):
            raise no_learning_rate()
        return PendingUpdate(update, self.gradients, cast(list[float | Tensor], rates), taken)

    def check_followed(self, method: BoundMethod) -> None:
        """Raise ConfigurationError if a method cannot follow the steps of the optimizers."""
        every = range(1 if method.latent_update is None else len(self.weights))
        follows = method.facts.follows_lr or method.latent_update is not None
        if follows and any(self.learning_rate(i) is None for i in every):
            raise no_learning_rate()
        rising = [self.names[i] for i in every if self.group(i).get("maximize")]
        if rising and method.latent_update is not None:
            raise ConfigurationError(
                f"The optimizer ascends the gradients of {some(rising)} (maximize=True), and the "
                f"method's {method.latent_update!r} descends them. Negate the loss instead."
            )

    def current(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizers hold now at the recorded positions.

        Raises:
            StateError: parameters or groups were removed or reordered.
        """
        groups = [optimizer.param_groups for optimizer in self.optimizers]
        found: list[nn.Parameter] = []
        for weight in self.weights:
            try:
                found.append(groups[weight.optimizer][weight.group]["params"][weight.position])
            except IndexError:
                raise StateError(
                    f"The optimizer no longer holds {weight.name}: a parameter group was removed. "
                    "Call detach() before you remove a group, and sparsify again after it."
                ) from None
        if not all(map(operator.is_, found, self.parameters)):
            self._check_replaced(found)
        return found

    def _check_replaced(self, found: Sequence[Tensor]) -> None:
        """Raise StateError unless parameters were replaced by others of the same shape."""
        pairs = list(zip(self.weights, found, strict=True))
        held = {
            id(parameter)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        bound = {id(weight.parameter) for weight in self.weights}
        for weight, parameter in pairs:
            if parameter is weight.parameter:
                continue
            moved = id(weight.parameter) in held or id(parameter) in bound
            if moved or parameter.shape != weight.parameter.shape:
                raise StateError(
                    f"The optimizer holds another parameter where it held {weight.name}: its "
                    "parameters were reordered, or some were removed. Restore their order. To "
                    "change the parameters of an optimizer, call detach() before, and sparsify "
                    "again after it."
                )

    def lost(self, model: nn.Module, current: Sequence[Tensor]) -> list[str]:
        """Return the names of weights whose current parameter the model does not hold."""
        root = unwrap(model)
        if self._path is not None and self._path.holds(root, current):
            return []
        self._path = find_path(root, self.names)
        if self._path is not None and self._path.holds(root, current):
            return []
        held = set(map(id, model.parameters()))
        pairs = zip(self.weights, current, strict=True)
        return [weight.name for weight, parameter in pairs if id(parameter) not in held]

    def check_held(self, model: nn.Module, current: Sequence[Tensor]) -> None:
        """Raise StateError unless the model holds the current parameters."""
        if computed := self.computed():
            raise computed_later(computed)
        lost = self.lost(model, current)
        if lost and fsdp_units(model):
            # Modules of `fully_shard` may hold gathered parameters, also after an evaluation.
            if not in_backward():
                reshard(model)
            lost = [] if in_backward() else self.lost(model, current)
        if lost:
            raise StateError(
                f"The model's {lost[0]} is no longer the parameter that the optimizer trains, as "
                "after load_state_dict(assign=True). Load with assign=False, or create optimizer "
                "and sparsifier again."
            )

    def computed(self) -> list[str]:
        """Return the names of weights that their modules do not hold any more.

        Their modules compute them from other parameters, since `torch.nn.utils.prune` or a
        parametrization was applied.
        """
        return [
            weight.name
            for weight in self.weights
            if weight.attribute not in weight.module._parameters
            or any(attribute not in module._parameters for module, attribute in weight.ties)
        ]

    def leaves(self, model: nn.Module) -> Iterator[tuple[int, Tensor]]:
        """Yield the position of each weight, and the tensor to register gradient hooks on.

        `fully_shard` gathers the parameters of a unit into other tensors, which the network uses.
        Hooks on its sharded parameters are never called.
        """
        gathered: dict[int, Tensor] = {}
        for unit in fsdp_units(model):
            unit.unshard()
            for i, weight in enumerate(self.weights):
                seen = weight.module._parameters.get(weight.attribute)
                if seen is not None and seen is not weight.parameter:
                    gathered[i] = seen
            unit.reshard()
        for i, weight in enumerate(self.weights):
            yield i, gathered.get(i, weight.parameter)


def bind(
    model: nn.Module,
    prunable: Sequence[Prunable],
    optimizer: Optimizer | Sequence[Optimizer],
) -> Binding:
    """Find each prunable weight in the optimizers.

    Args:
        model: the model.
        prunable: its prunable weights.
        optimizer: one or several optimizers, or wrappers of them (Accelerate, Lightning).

    Raises:
        ConfigurationError: a weight is held by no optimizer or more than once, or a weight or
            optimizer is not supported.

    Example:
        >>> import torch
        >>> from torch_feather.prunable import find_prunable
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> weight = bind(model, find_prunable(model), optimizer).weights[0]
        >>> weight.name, weight.optimizer, weight.group, weight.position
        ('weight', 0, 0, 0)
    """
    given = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    optimizers = [_checked(one) for one in given]
    found: dict[int, list[tuple[int, int, int]]] = {}
    for o, one in enumerate(optimizers):
        for g, group in enumerate(one.param_groups):
            for i, parameter in enumerate(group["params"]):
                found.setdefault(id(parameter), []).append((o, g, i))
    if not prunable:
        raise ConfigurationError(
            f"{type(model).__name__} has no prunable weights: include and exclude leave no "
            "trainable weight of a convolution, linear layer or attention projection (frozen "
            "weights are not pruned). Name the weights to prune with include=."
        )
    missing = [p.name for p in prunable if id(p.parameter) not in found]
    if missing:
        raise ConfigurationError(
            f"No optimizer holds {some(missing)}. Pass all optimizers that train the model to "
            "sparsify, after any move that replaces parameters. Or exclude these weights "
            "(exclude=)."
        )
    shared = [p.name for p in prunable if len(found[id(p.parameter)]) > 1]
    if shared:
        raise ConfigurationError(
            f"The optimizers hold {some(shared)} more than once, so each step would update it "
            "twice. Give every parameter to one optimizer."
        )
    check_storage([p.name for p in prunable], [p.parameter for p in prunable])
    _check_free(model, prunable)
    ties = _ties(model, prunable)
    weights = [
        BoundWeight(p.name, p.module, p.attribute, p.parameter, *found[id(p.parameter)][0], tied)
        for p, tied in zip(prunable, ties, strict=True)
    ]
    return Binding(weights, optimizers)


def _ties(
    model: nn.Module, prunable: Sequence[Prunable]
) -> list[tuple[tuple[nn.Module, str], ...]]:
    """Return for each weight the other modules that hold it, with its names in them."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {id(p.parameter): [] for p in prunable}
    for module in unwrap(model).modules():
        for attribute, parameter in module._parameters.items():
            if id(parameter) in holders:
                holders[id(parameter)].append((module, attribute))
    return [
        tuple(one for one in holders[id(p.parameter)] if one != (p.module, p.attribute))
        for p in prunable
    ]


def _check_free(model: nn.Module, prunable: Sequence[Prunable]) -> None:
    """Raise ConfigurationError if weights have a sparsifier, or step without calling hooks."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and any(
        hasattr(p.parameter, "_in_backward_optimizers") for p in prunable
    ):
        raise ConfigurationError(
            "DistributedDataParallel steps optimizers of _apply_optimizer_in_backward while it "
            "averages gradients, without calling hooks. Step the optimizer after the backward pass."
        )
    deleted = forget_deleted([p.parameter for p in prunable])
    if deleted:
        warn(
            f"The sparsifier of {some([prunable[i].name for i in deleted])} was deleted with its "
            "optimizer, and the latent weights with it: training starts from the effective "
            "weights. To start from the latent weights, call detach() before deleting an optimizer."
        )
    for p in prunable:
        if p.parameter in attached:
            raise ConfigurationError(
                f"{p.name} already has a sparsifier. Call its detach() or finalize() first."
            )


def computed_later(names: Sequence[str]) -> StateError:
    """Return the error for weights that are computed from other parameters since `sparsify`.

    Example:
        >>> raise computed_later(["fc.weight"])
        Traceback (most recent call last):
        torch_feather.errors.StateError: fc.weight is computed from other parameters since ...
    """
    listed = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    return StateError(
        f"{some(names)} {'is' if len(names) == 1 else 'are'} computed from other parameters since "
        "sparsify was called, as by torch.nn.utils.prune or a parametrization, so the zeros would "
        "not last. Remove it again (prune.remove, remove_parametrizations) before the next step. "
        f"To keep it, apply it before sparsify is called, with exclude=[{listed}]."
    )


def forget_deleted(parameters: Sequence[Tensor]) -> list[int]:
    """Remove parameters from `attached` whose sparsifier was deleted with its optimizer.

    Returns:
        Their positions in `parameters`.

    Example:
        >>> import torch
        >>> forget_deleted([torch.ones(2)])
        []
    """
    found = [i for i, p in enumerate(parameters) if p in attached and attached[p]() is None]
    for i in found:
        del attached[parameters[i]]
    return found


def _checked(optimizer: Any) -> Optimizer:
    """Return the optimizer to attach to; raise ConfigurationError if it is not supported."""
    found = checked(optimizer)
    if any(level in attached for level in levels_of(found)):
        raise ConfigurationError(
            f"This {type(found).__name__} already has a sparsifier. Call its detach() or "
            "finalize() first."
        )
    return found
