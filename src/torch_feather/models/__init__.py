"""The CIFAR networks of the Feather paper, and access to the models of timm by name."""

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
    """Return the names of the networks of this module, for `create`.

    `create` also accepts `timm/NAME` for each model of timm.

    Example:
        >>> available_models()
        ['resnet20', 'resnet8', 'mobilenet_v1', 'densenet40_24']
    """
    return list(_MODELS)


def create(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Create a network by name, with random initial weights.

    Args:
        name: one of `available_models()`, or `timm/NAME`.
        num_classes: number of classes.
        in_channels: channels of an image.

    Raises:
        ConfigurationError: the name is unknown, or a number is below 1.
        ImportError: the name is `timm/NAME` and timm is not installed.

    Example:
        >>> import torch
        >>> model = create("resnet8", num_classes=10, in_channels=1)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    for option, number in (("num_classes", num_classes), ("in_channels", in_channels)):
        if number < 1:
            raise ConfigurationError(f"{option} must be at least 1, got {number}.")
    if name.startswith(TIMM):
        return create_timm(name, num_classes=num_classes, in_chans=in_channels)
    if name not in _MODELS:
        raise ConfigurationError(
            f"unknown network {name!r}{nearest(name, _MODELS)} "
            f"Available: {', '.join(_MODELS)}, and timm/NAME."
        )
    return _MODELS[name](num_classes, in_channels)


def create_timm(name: str, **options: Any) -> nn.Module:
    """Create a model of timm.

    Args:
        name: `timm/NAME`.
        options: keyword arguments of `timm.create_model`.

    Raises:
        ConfigurationError: timm has no model of this name.
        ImportError: timm is not installed.

    Example:
        >>> import torch
        >>> model = create_timm("timm/mobilenetv3_small_050", num_classes=10, in_chans=3)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"network {name!r} requires timm: pip install 'torch-feather[vision]'"
        ) from error
    name = name.removeprefix(TIMM)
    if not timm.is_model(name):
        raise ConfigurationError(
            f"timm has no model {name!r}{nearest(name, timm.list_models())} "
            "timm.list_models() lists all models."
        )
    return timm.create_model(name, **options)
