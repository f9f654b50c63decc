"""Where the model and its optimizers hold the prunable weights, and which of them are handled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import ConfigurationError, some
from ..prunable import Prunable
from ..weights.shards import is_sharded, local

# Optimizers that write parameters outside of step(), where latent and sparse weights would mix.
WRITE_OUTSIDE_STEP = ("ScheduleFree", "Lookahead")
# Optimizers that hold or step the parameters in a way that is not handled, and what does instead.
NOT_HANDLED = {
    "ZeroRedundancyOptimizer": "has a state dict of its own, without latent weights. fully_shard "
    "with a plain optimizer spreads the optimizer's state and the latent weights alike",
    "CPUOffloadOptimizer": "trains copies of the weights that are its own. fully_shard with "
    "CPUOffloadPolicy and a plain optimizer keeps weights, latent weights and state on the CPU",
}

# Optimizers and parameters that a sparsifier is attached to.
attached: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(eq=False)
class Slot:
    """A prunable weight, and where the model and the optimizer hold it."""

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter
    optimizer: int
    group: int
    position: int

    @property
    def local(self) -> Tensor:
        """What this process holds of the parameter: all of it, or its shard."""
        return local(self.parameter)


def bind(
    model: nn.Module,
    prunable: Sequence[Prunable],
    optimizer: Optimizer | Sequence[Optimizer],
) -> tuple[list[Slot], list[Optimizer]]:
    """Finds each prunable weight in the optimizers, by (optimizer, group, position)."""
    given = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    optimizers = [_checked(one) for one in given]
    places: dict[int, list[tuple[int, int, int]]] = {}
    for o, one in enumerate(optimizers):
        for g, group in enumerate(one.param_groups):
            for i, parameter in enumerate(group["params"]):
                places.setdefault(id(parameter), []).append((o, g, i))
    if not prunable:
        raise ConfigurationError(
            f"{type(model).__name__} has no prunable weights: no trainable weight of a "
            "convolution, linear layer or attention projection is left by include and exclude "
            "(frozen weights are left alone). Name what should take part with include=."
        )
    missing = [p.name for p in prunable if id(p.parameter) not in places]
    if missing:
        raise ConfigurationError(
            f"No optimizer holds {some(missing)}. Give sparsify all optimizers that train the "
            "model, after any move that replaces parameters, or leave these weights out: exclude=."
        )
    shared = [p.name for p in prunable if len(places[id(p.parameter)]) > 1]
    if shared:
        raise ConfigurationError(
            f"{some(shared)} is held more than once by the optimizers: each step would update it "
            "twice. Give every parameter to one optimizer."
        )
    check_storage([p.name for p in prunable], [p.parameter for p in prunable])
    if isinstance(model, nn.parallel.DistributedDataParallel) and any(
        hasattr(p.parameter, "_in_backward_optimizers") for p in prunable
    ):
        raise ConfigurationError(
            "DistributedDataParallel steps optimizers of _apply_optimizer_in_backward while it "
            "averages gradients, unseen. Step the optimizer after the backward pass."
        )
    for p in prunable:
        if p.parameter in attached:
            raise ConfigurationError(
                f"{p.name} already has a sparsifier. Call its detach() or finalize() first."
            )
    slots = [
        Slot(p.name, p.module, p.attribute, p.parameter, *places[id(p.parameter)][0])
        for p in prunable
    ]
    return slots, optimizers


def plain_optimizer(optimizer: Any) -> Any:
    """The optimizer behind the wrappers of Accelerate and Lightning."""
    while hasattr(optimizer, "optimizer") and not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        optimizer = optimizer.optimizer
    return optimizer


def _checked(optimizer: Any) -> Optimizer:
    """The torch optimizer behind wrappers, if it can be used."""
    optimizer = plain_optimizer(optimizer)
    kinds = [kind.__name__ for kind in type(optimizer).__mro__]
    wrapped = getattr(optimizer, "optimizer", None) or getattr(optimizer, "base_optimizer", None)
    if wrapped is not None:
        kinds += [kind.__name__ for kind in type(wrapped).__mro__]
    for refused in WRITE_OUTSIDE_STEP:
        name = next((kind for kind in kinds if refused in kind), None)
        if name:
            raise ConfigurationError(
                f"{name} writes parameters outside of step(), where they hold the sparse weights "
                "and not the latent ones it means. Use a plain optimizer; for an average of the "
                "weights see torch_feather.LatentAverage."
            )
    for refused, why in NOT_HANDLED.items():
        if refused in kinds:
            raise ConfigurationError(f"{refused} is not handled: it {why}.")
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(
            "optimizer must be a torch.optim.Optimizer or a sequence of them, got "
            f"{type(optimizer).__name__}."
        )
    if optimizer in attached:
        raise ConfigurationError(
            f"This {type(optimizer).__name__} already has a sparsifier. Call its detach() or "
            "finalize() first."
        )
    return optimizer


def check_storage(names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Raises ConfigurationError where the engine cannot exchange the values of parameters."""
    for name, parameter in zip(names, parameters, strict=True):
        out = f"Leave it out: exclude={name!r}."
        if not parameter.is_floating_point():
            raise ConfigurationError(
                f"{name} is {parameter.dtype}; only floating-point weights can be pruned. {out}"
            )
        if parameter.dim() == 0:
            raise ConfigurationError(
                f"{name} is a single number, of which no share can be pruned. {out}"
            )
        if is_sharded(parameter):
            if any(p.is_partial() for p in parameter.placements):  # type: ignore[attr-defined]
                raise ConfigurationError(
                    f"{name} is a sum over processes (a Partial placement): its values are "
                    f"nowhere. Redistribute it. {out}"
                )
            whole, parameter = parameter, local(parameter)
            if not parameter.is_contiguous():
                raise ConfigurationError(
                    f"The shard of {name} is not contiguous in memory. Shard it by "
                    f"fully_shard, parallelize_module or distribute_tensor. {out}"
                )
            if parameter.numel() == 0 < whole.numel():
                continue
        if parameter.layout != torch.strided or parameter.device.type not in ("cpu", "cuda"):
            raise ConfigurationError(
                f"{name} lies on {parameter.device} with layout {parameter.layout}; weights must "
                "be ordinary (strided) tensors on a CPU or a CUDA device."
            )
        if parameter.numel() == 0 or not _is_dense(parameter):
            raise ConfigurationError(
                f"{name} is empty or does not fill its memory (shape {tuple(parameter.shape)}, "
                f"strides {parameter.stride()}). Make it contiguous. {out}"
            )
    devices = sorted({str(local(parameter).device) for parameter in parameters})
    if len(devices) > 1:
        raise ConfigurationError(
            f"The prunable weights lie on several devices ({', '.join(devices)}); a common "
            "threshold needs them on one."
        )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlap."""
    expected = 1
    for stride, size in sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True
