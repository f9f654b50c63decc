"""The settings of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...errors import shorten
from ...import_path import is_import_path
from .checks import choice, finite, require, within

TIMM = "timm/"
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "step", "constant")
MOST_EPOCHS = 10**6


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rate over the steps, and settings by layer.

    Raises:
        ConfigurationError: a value out of range.

    Example:
        >>> OptimizerConfig(lr=0.05).clip  # the default
        3.0
        >>> from torch_feather.errors import ConfigurationError
        >>> try:
        ...     OptimizerConfig(momentum=1.0)
        ... except ConfigurationError as error:
        ...     print(error)
        optimizer.momentum must be in [0, 1), got 1.0
    """

    # sgd, adamw, timm/NAME for an optimizer of timm, or package.module:Class.
    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9  # of sgd
    nesterov: bool = False  # of sgd
    weight_decay: float = 5e-4  # of weights; norm parameters and biases do not decay
    # Further keyword arguments of the optimizer, such as {betas: [0.9, 0.95]}.
    arguments: dict[str, Any] = field(default_factory=dict)
    # By name pattern of parameters: lr, a factor, and weight_decay, such as {"fc.*": {lr: 10}}.
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    # The learning rate of each block is this factor of that of the next one (timm's); 1: the same.
    layer_decay: float = 1.0
    schedule: str = "cosine"  # after the warm-up: cosine to 0, step or constant
    milestones: list[float] | None = None  # step: epochs; null: 1/2 and 3/4 of the training
    gamma: float = 0.1  # step: factor at each milestone
    clip: float | None = 3.0  # maximum gradient norm; null: no clipping
    label_smoothing: float = 0.0
    warmup_epochs: float = 0.0
    warmup_fraction: float = 0.0  # warm-up as a fraction of the training, instead of warmup_epochs

    def __post_init__(self) -> None:
        if not is_import_path(self.name) and not self.name.startswith(TIMM):
            choice("optimizer.name", self.name, OPTIMIZERS, f"{TIMM}NAME, package.module:Class")
        choice("optimizer.schedule", self.schedule, SCHEDULES)
        self._check_layers()
        require(
            0 < self.layer_decay <= 1,
            f"optimizer.layer_decay must be in (0, 1], got {self.layer_decay}",
        )
        require(0 < self.gamma <= 1, f"optimizer.gamma must be in (0, 1], got {self.gamma}")
        require(
            self.milestones is None
            or (sorted(self.milestones) == self.milestones and min(self.milestones, default=1) > 0),
            f"optimizer.milestones must be rising numbers of epochs, got {self.milestones}",
        )
        require(
            0 <= self.warmup_fraction < 1,
            f"optimizer.warmup_fraction must be in [0, 1), got {self.warmup_fraction}",
        )
        require(
            not (self.warmup_epochs and self.warmup_fraction),
            "optimizer.warmup_epochs and optimizer.warmup_fraction both set the warm-up. Set one "
            "of them to 0.",
        )
        require(self.lr > 0, f"optimizer.lr must be positive, got {self.lr}")
        require(
            0 <= self.momentum < 1, f"optimizer.momentum must be in [0, 1), got {self.momentum}"
        )
        require(
            not self.nesterov or self.momentum > 0,
            "optimizer.nesterov requires optimizer.momentum above 0",
        )
        require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay must not be negative, got {self.weight_decay}",
        )
        require(
            self.clip is None or self.clip > 0,
            f"optimizer.clip must be positive, or null for no clipping; got {self.clip}",
        )
        require(
            0 <= self.label_smoothing < 1,
            f"optimizer.label_smoothing must be in [0, 1), got {self.label_smoothing}",
        )
        require(
            self.warmup_epochs >= 0,
            f"optimizer.warmup_epochs must not be negative, got {self.warmup_epochs}",
        )
        within("optimizer.warmup_epochs", self.warmup_epochs, 0, MOST_EPOCHS)
        finite("optimizer.lr", self.lr)
        finite("optimizer.weight_decay", self.weight_decay)

    def _check_layers(self) -> None:
        for pattern, values in self.layers.items():
            key = f"optimizer.layers, {shorten(pattern)}"
            require(
                isinstance(values, dict) and {"lr", "weight_decay"} >= values.keys() and values,
                f"{key}: must have lr, weight_decay or both, got {shorten(values)}",
            )
            for name, value in values.items():
                number = isinstance(value, int | float) and not isinstance(value, bool)
                require(number, f"{key}: {name} must be a number, got {shorten(value)}")
                within(f"{key}: {name}", value, 0, 1e9)
