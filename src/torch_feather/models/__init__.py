"""The paper's CIFAR networks; all others come from timm by name."""

from typing import Any

from torch import nn

from ..errors import ConfigurationError, nearest
from .densenet import DenseNet, densenet40_24
from .mobilenet import MobileNetV1, mobilenet_v1
from .resnet import ResNet, resnet8, resnet20

__all__ = [
    "DenseNet",
    "MobileNetV1",
    "ResNet",
    "available_models",
    "create",
    "densenet40_24",
    "mobilenet_v1",
    "resnet8",
    "resnet20",
]

TIMM = "timm/"

_MODELS = {
    "resnet20": resnet20,
    "resnet8": resnet8,
    "mobilenet_v1": mobilenet_v1,
    "densenet40_24": densenet40_24,
}


def available_models() -> list[str]:
    """Names that `create` knows by itself; `timm/NAME` reaches every model of timm."""
    return list(_MODELS)


def create(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build a freshly initialised network by name: one of `available_models()`, or `timm/NAME`.

    Raises:
        ConfigurationError: a name that nobody knows (the nearest known one is told), or a
            count below 1.
        ImportError: `timm/NAME` was asked for and timm is not installed.
    """
    for what, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        if count < 1:
            raise ConfigurationError(f"{what} must be at least 1, got {count}")
    if name.startswith(TIMM):
        return create_timm(name, num_classes=num_classes, in_chans=in_channels)
    if name not in _MODELS:
        raise ConfigurationError(
            f"unknown network {name!r}{nearest(name, _MODELS)} "
            f"Known are {', '.join(_MODELS)}, and timm/NAME."
        )
    return _MODELS[name](num_classes, in_channels)


def create_timm(name: str, **options: Any) -> nn.Module:
    """Build `timm/NAME` with the options of `timm.create_model`; raises what `create` does."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"network {name!r} needs timm: pip install 'torch-feather[vision]'"
        ) from error
    name = name.removeprefix(TIMM)
    if not timm.is_model(name):
        raise ConfigurationError(
            f"timm has no model {name!r}{nearest(name, timm.list_models())} "
            "timm.list_models() shows all."
        )
    return timm.create_model(name, **options)
