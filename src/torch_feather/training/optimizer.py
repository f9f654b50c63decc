"""The optimizer of a run, and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..errors import ConfigurationError
from .config import Config, OptimizerConfig


def make_optimizer(
    model: nn.Module, options: OptimizerConfig, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Return SGD or AdamW for `model`, without weight decay for vectors (biases, norms).

    Args:
        model: the network.
        options: name, learning rate, momentum and weight decay.
        fused: as for `torch.optim.SGD`.

    Example:
        >>> optimizer = make_optimizer(nn.Linear(2, 2), OptimizerConfig(weight_decay=0.1))
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.1, 0.0]
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if p.ndim > 1],
            "weight_decay": options.weight_decay,
        },
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.name == "adamw":
        # capturable: the step count is on the device, as a CUDA graph requires.
        return torch.optim.AdamW(groups, lr=options.lr, fused=fused, capturable=bool(fused))
    return torch.optim.SGD(
        groups,
        lr=options.lr,
        momentum=options.momentum,
        nesterov=options.nesterov,
        fused=fused,
    )


def learning_rate(options: OptimizerConfig, step: int, total_steps: int, epoch_steps: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine to 0.

    Args:
        options: the maximum learning rate and the length of the warm-up.
        step: the number of the step, from 0.
        total_steps: steps of the whole run.
        epoch_steps: steps of an epoch.

    Example:
        >>> options = OptimizerConfig(lr=1.0, warmup_epochs=1)
        >>> [round(learning_rate(options, step, 8, 4), 2) for step in range(8)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    warmup = warmup_steps(options, total_steps, epoch_steps)
    if step < warmup:
        return options.lr * ((step + 1) / warmup)
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
