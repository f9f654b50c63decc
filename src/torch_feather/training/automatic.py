"""Settings that are chosen from the data, the network and the machine when a training starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..errors import ConfigurationError, nearest
from ..methods.choice import Situation, choose, network_kind
from ..prunable import find_prunable
from .config import AUTO, PRETRAINED, Config, apply
from .data import count_training_images
from .network_info import NetworkInfo, check_trusted, read_network_info
from .precision import has_bfloat16

MOST_LETTERS = 32_000  # in the names of classes
STEPS = 50  # aim for an epoch
SMALLEST_BATCH, LARGEST_BATCH = 8, 256
# Learning rates at a batch of 64 for trained weights, and for new ones.
SGD_LR, SGD_LR_NEW = 0.02, 0.1
ADAMW_LR, ADAMW_LR_NEW = 2e-4, 1e-3


class Facts:
    """What the choices depend on, read when it is needed.

    Args:
        config: the configuration.
        device: the device to train on.

    Example:
        >>> Facts(Config(), torch.device("cpu")).images  # of digits, without those of validation
        1294
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device

    @cached_property
    def images(self) -> int:
        """Number of training images."""
        return count_training_images(self.config.data, self.config.seed)

    @cached_property
    def origin(self) -> NetworkInfo | None:
        """The network that the initial weights are from, if it is known."""
        if self.config.init in (None, PRETRAINED):
            return None
        return read_network_info(Path(str(self.config.init)))

    def same_network(self, config: Config) -> NetworkInfo | None:
        """Return `origin` if it is the network to train."""
        origin = self.origin
        return origin if origin is not None and origin.network == config.network else None


def choose_settings(config: Config, device: torch.device) -> Config:
    """Return a configuration with a method, in which the settings of `automatic` are chosen.

    The choice is deterministic: it depends on the number of training images, the network, its
    initial weights, and on whether the device computes in bfloat16. The method is chosen last, if
    it is auto: it depends on the other settings.

    Args:
        config: the configuration. Settings that `automatic` does not name are kept.
        device: the device to train on.

    Raises:
        ConfigurationError: a setting cannot be chosen, or the network does not exist.
        DataError: the images cannot be found.

    Example:
        >>> from .config import resolve_config
        >>> settings = {"data.name": "digits", "network": "resnet8", "init": None}
        >>> config = resolve_config("finetune", overrides=settings)
        >>> found = choose_settings(config, torch.device("cpu"))
        >>> found.batch_size, found.optimizer.name, found.automatic
        (16, 'sgd', None)
    """
    wanted = set(config.automatic or ())
    if unknown := [key for key in config.automatic or () if key not in CHOICES]:
        raise ConfigurationError(
            f"automatic: {unknown[0]!r} cannot be chosen{nearest(unknown[0], CHOICES)} These can: "
            f"{', '.join(CHOICES)}."
        )
    if not wanted and config.method != AUTO:
        return config
    facts = Facts(config, device)
    assert facts.images  # first, so that errors of the images come before those of the network
    for keys in ORDER:
        found = {key: CHOICES[key](config, facts) for key in keys if key in wanted}
        config = apply(config, found, f"choice of {', '.join(found)}") if found else config
    config = replace(config, automatic=None)
    return _with_method(config, facts) if config.method == AUTO else config


def _with_method(config: Config, facts: Facts) -> Config:
    """Return a configuration with the method that the rules choose, and the reason."""
    network = _skeleton(config.network)
    prunable = find_prunable(network, config.include, config.exclude, frozen=False)
    batches = facts.images / config.batch_size
    whole = math.floor(batches) if config.data.drop_last else math.ceil(batches)
    optimizer = config.optimizer.name.rpartition("/")[2].rpartition(":")[2]
    situation = Situation(
        config.sparsity,
        network_kind(prunable),
        {"sgd": "SGD", "adamw": "AdamW"}.get(optimizer, optimizer),
        config.epochs * whole,
    )
    choice = choose(situation)
    reason = f"method auto chose {choice}"
    return replace(config, method=choice.method, options=dict(choice.options), method_reason=reason)


def with_class_names(config: Config, names: tuple[str, ...]) -> Config:
    """Return a configuration that holds the names of the classes.

    Args:
        config: the configuration.
        names: the names. Very many are left to report.json: config.yaml must stay small.

    Example:
        >>> with_class_names(Config(), ("cat", "dog")).data.class_names
        ['cat', 'dog']
    """
    if sum(map(len, names)) > MOST_LETTERS:
        return config
    return replace(config, data=replace(config.data, class_names=list(names)))


def _network(config: Config, facts: Facts) -> str:
    if facts.origin is None:
        return config.network
    check_trusted(facts.origin.network, Path(str(config.init)), config.network)
    return facts.origin.network


def _published(config: Config) -> dict[str, Any]:
    """Return the settings with which timm's weights of the network were trained."""
    if not config.network.startswith(models.TIMM):
        return {}
    return models.published_settings(config.network)


def _resolution(config: Config, facts: Facts) -> int | None:
    if (origin := facts.same_network(config)) is not None:
        return origin.input_shape[1]
    size = _published(config).get("input_size")
    return config.data.resolution if size is None else size[1]


def _center(config: Config, facts: Facts) -> float | None:
    if (origin := facts.same_network(config)) is not None:
        return origin.input_shape[1] / origin.side
    fraction = _published(config).get("crop_pct")
    return config.data.center if fraction is None else min(1.0, fraction)


def _moments(key: str) -> Callable[[Config, Facts], list[float] | None]:
    def choose(config: Config, facts: Facts) -> list[float] | None:
        origin = facts.same_network(config)
        found = _published(config).get(key) if origin is None else getattr(origin, key)
        # A network for grey images has one number, a folder of images three channels.
        return list(found) if found is not None and len(found) == 3 else getattr(config.data, key)

    return choose


def _batch_size(config: Config, facts: Facts) -> int:
    """Return a power of 2 with about `STEPS` steps in an epoch."""
    fitting = max(1, facts.images // STEPS)
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, 2 ** math.floor(math.log2(fitting))))


def _drop_last(config: Config, facts: Facts) -> bool:
    """Return whether the last batch of an epoch would have one image: too few for batch norm."""
    return facts.images % config.batch_size == 1 and facts.images > config.batch_size


def _optimizer(config: Config, facts: Facts) -> str:
    """Return sgd for networks with batch norm, which was made for it; adamw for others."""
    network = _skeleton(config.network)
    norms = (nn.modules.batchnorm._BatchNorm,)
    return "sgd" if any(isinstance(module, norms) for module in network.modules()) else "adamw"


def _skeleton(name: str) -> nn.Module:
    """Return a network for its structure: without memory for weights if possible."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return models.create(name, num_classes=2)
        # A few read values while they are created; the error of a factory is a ConfigurationError.
        except (NotImplementedError, RuntimeError, ConfigurationError):
            return models.create(name, num_classes=2)


def _lr(config: Config, facts: Facts) -> float:
    """Return the rate for the batch size: linear in it for SGD, its square root for AdamW."""
    new, ratio = config.init is None, config.batch_size / 64
    if config.optimizer.name == "adamw":
        return _rounded((ADAMW_LR_NEW if new else ADAMW_LR) * math.sqrt(ratio))
    return _rounded((SGD_LR_NEW if new else SGD_LR) * ratio)


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def _weight_decay(config: Config, facts: Facts) -> float:
    return 0.05 if config.optimizer.name == "adamw" else 5e-4


def _amp(config: Config, facts: Facts) -> bool:
    return has_bfloat16(facts.device)


CHOICES: dict[str, Callable[[Config, Facts], Any]] = {
    "network": _network,
    "data.resolution": _resolution,
    "data.center": _center,
    "data.mean": _moments("mean"),
    "data.std": _moments("std"),
    "batch_size": _batch_size,
    "data.drop_last": _drop_last,
    "optimizer.name": _optimizer,
    "optimizer.lr": _lr,
    "optimizer.weight_decay": _weight_decay,
    "system.amp": _amp,
}

# Later choices use earlier ones; those of one line are made together.
ORDER = (
    ("network",),
    ("data.resolution", "data.center", "data.mean", "data.std"),
    ("batch_size", "optimizer.name", "system.amp"),
    ("data.drop_last", "optimizer.lr", "optimizer.weight_decay"),
)
