"""The optimizer of a run: its groups of parameters, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import models
from ..errors import ConfigurationError, nearest
from ..filters import matches_glob
from ..import_path import accepted, import_object, is_import_path
from .config import Config, OptimizerConfig

SCALE = "lr_scale"  # key of groups, as in timm: factor of the learning rate


def make_optimizer(
    model: nn.Module, options: OptimizerConfig, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer for `model`, without weight decay for vectors (biases, norms).

    Args:
        model: the network.
        options: name, learning rate, weight decay, and settings by layer.
        fused: as for `torch.optim.SGD`; used for SGD and AdamW.

    Raises:
        ConfigurationError: an optimizer or argument that does not exist, or a name pattern without
            a match.
        ImportError: timm is required and not installed.

    Example:
        >>> optimizer = make_optimizer(nn.Linear(2, 2), OptimizerConfig(weight_decay=0.1))
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.1, 0.0]
    """
    groups, given = parameter_groups(model, options), options.arguments
    if options.name == "adamw":
        # capturable: the step count is on the device, as a CUDA graph requires.
        usual: dict[str, Any] = {"fused": fused, "capturable": bool(fused)}
        return _call(torch.optim.AdamW, groups, options, usual | given)
    if options.name == "sgd":
        usual = {"momentum": options.momentum, "nesterov": options.nesterov, "fused": fused}
        return _call(torch.optim.SGD, groups, options, usual | given)
    if options.name.startswith(models.TIMM):
        return _timm(groups, options)
    kind = import_object(options.name, "Optimizer")
    optimizer = _call(kind, groups, options, given)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(
            f"optimizer.name: {options.name!r} returned {type(optimizer).__name__}. Name a class "
            "derived from torch.optim.Optimizer."
        )
    return optimizer


def _call(
    kind: Any, groups: list[dict[str, Any]], options: OptimizerConfig, arguments: Mapping[str, Any]
) -> Any:
    """Create an optimizer; errors name the settings."""
    try:
        return kind(groups, **accepted(kind, {"lr": options.lr}), **arguments)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(
            f"optimizer.name={options.name} with optimizer.arguments={options.arguments}: {first}"
        ) from error


def _timm(groups: list[dict[str, Any]], options: OptimizerConfig) -> torch.optim.Optimizer:
    models.import_timm(options.name)
    from timm.optim import create_optimizer_v2, list_optimizers

    name = options.name.removeprefix(models.TIMM)
    known = [str(one) for one in list_optimizers()]
    if name not in known:
        raise ConfigurationError(
            f"optimizer.name: timm has no optimizer {name!r}{nearest(name, known)} "
            "timm.optim.list_optimizers() lists all."
        )

    def make(groups: list[dict[str, Any]], **arguments: Any) -> torch.optim.Optimizer:
        momentum = arguments.pop("momentum", options.momentum)
        return create_optimizer_v2(groups, opt=name, momentum=momentum, **arguments)

    return _call(make, groups, options, options.arguments)


def parameter_groups(model: nn.Module, options: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of equal weight decay and learning rate.

    Args:
        model: the network.
        options: the weight decay, settings by layer, and the decay of the rate over the blocks.

    Raises:
        ConfigurationError: a name pattern without a match.

    Example:
        >>> options = OptimizerConfig(layers={"1.*": {"lr": 10, "weight_decay": 0}})
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> groups = parameter_groups(model, options)
        >>> [(len(group["params"]), group["lr_scale"]) for group in groups]
        [(1, 1.0), (1, 10.0), (1, 1.0), (1, 10.0)]
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decays = {name: options.weight_decay if p.ndim > 1 else 0.0 for name, p in named.items()}
    scales = dict.fromkeys(named, 1.0) if options.layer_decay == 1 else _decayed(model, options)
    for pattern, values in options.layers.items():
        matched = [name for name in named if matches_glob(pattern, name)]
        if not matched:
            raise ConfigurationError(
                f"optimizer.layers: {pattern!r} matches no parameter{nearest(pattern, named)}"
            )
        for name in matched:
            scales[name] *= float(values.get("lr", 1.0))
            decays[name] = float(values.get("weight_decay", decays[name]))
    groups: dict[tuple[float, ...], dict[str, Any]] = {}
    # First the weights, then the vectors: the order of checkpoints of earlier versions.
    for vectors in (False, True):
        for name, parameter in named.items():
            if (parameter.ndim <= 1) is vectors:
                key = (vectors, scales[name], decays[name])
                group = groups.setdefault(key, {"params": [], "weight_decay": decays[name]})
                group["params"].append(parameter)
                if set(scales.values()) != {1.0}:
                    group[SCALE] = scales[name]
    return list(groups.values())


def _decayed(model: nn.Module, options: OptimizerConfig) -> dict[str, float]:
    """Return the factors of the learning rate that timm gives the blocks of a network."""
    models.import_timm("optimizer.layer_decay")
    from timm.optim import param_groups_layer_decay

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, 0.0, layer_decay=options.layer_decay)
    return {names[id(p)]: group[SCALE] for group in groups for p in group["params"]}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: Any) -> None:
    """Set the learning rate of all groups.

    Args:
        optimizer: the optimizer.
        lr: the rate; groups with `lr_scale` take this multiple of it.

    Example:
        >>> parameter = nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([{"params": [parameter], "lr_scale": 10.0}], lr=1.0)
        >>> set_learning_rate(optimizer, 0.5)
        >>> optimizer.param_groups[0]["lr"]
        5.0
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group[SCALE] if SCALE in group else lr


def learning_rate(options: OptimizerConfig, step: int, total_steps: int, epoch_steps: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then the schedule.

    Args:
        options: the maximum learning rate, the length of the warm-up, and the schedule.
        step: the number of the step, from 0.
        total_steps: steps of the whole run.
        epoch_steps: steps of an epoch.

    Example:
        >>> options = OptimizerConfig(lr=1.0, warmup_epochs=1)
        >>> [round(learning_rate(options, step, 8, 4), 2) for step in range(8)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.85, 0.5, 0.15]
        >>> options = OptimizerConfig(lr=1.0, schedule="step", milestones=[1.5])
        >>> [learning_rate(options, step, 8, 4) for step in range(8)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1]
    """
    warmup = warmup_steps(options, total_steps, epoch_steps)
    if step < warmup:
        return options.lr * ((step + 1) / warmup)
    if options.schedule == "constant":
        return options.lr
    if options.schedule == "step":
        epochs = options.milestones
        steps = [total_steps / 2, total_steps * 3 / 4]
        if epochs is not None:
            steps = [epoch * epoch_steps for epoch in epochs]
        return options.lr * options.gamma ** sum(step >= milestone for milestone in steps)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_steps(options: OptimizerConfig, total_steps: int, epoch_steps: int) -> int:
    """Return the steps of the warm-up.

    Args:
        options: the length of the warm-up, in epochs or as a fraction of the training.
        total_steps: steps of the whole run.
        epoch_steps: steps of an epoch.

    Example:
        >>> warmup_steps(OptimizerConfig(warmup_fraction=0.1), 200, 10)
        20
    """
    if options.warmup_fraction:
        return round(options.warmup_fraction * total_steps)
    return round(options.warmup_epochs * epoch_steps)


def check_warmup(config: Config) -> None:
    """Raise an error if the warm-up takes the whole training or more.

    Args:
        config: the configuration of a run.

    Raises:
        ConfigurationError: the learning rate would not reach its maximum before the end.

    Example:
        >>> try:
        ...     check_warmup(Config(epochs=2, optimizer=OptimizerConfig(warmup_epochs=5)))
        ... except ConfigurationError as error:
        ...     print(error)
        the warm-up takes 5 epochs (optimizer.warmup_epochs), but the training has 2. Set ...
    """
    warmup = config.optimizer.warmup_epochs
    if warmup >= config.epochs:
        raise ConfigurationError(
            f"the warm-up takes {warmup:g} epochs (optimizer.warmup_epochs), but the training has "
            f"{config.epochs}. Set more epochs, or a share of the training instead: "
            "optimizer.warmup_epochs=0 and optimizer.warmup_fraction=0.1."
        )


def changes_its_groups(options: OptimizerConfig) -> bool:
    """Whether an optimizer may store values of its own in its groups, as only foreign ones do.

    Args:
        options: the settings of the optimizer.

    Example:
        >>> changes_its_groups(OptimizerConfig()), changes_its_groups(OptimizerConfig("a:B"))
        (False, True)
    """
    return is_import_path(options.name) or options.name.startswith(models.TIMM)
