"""The CIFAR networks of the Feather paper, small transformers, and models of timm by name."""

from typing import Any

from torch import nn

from ..errors import ConfigurationError, install_hint, nearest
from ..import_path import accepted, import_object, is_import_path
from .densenet import DenseNet, densenet40_24
from .mobilenet import MobileNetV1, mobilenet_v1
from .resnet import ResNet, resnet8, resnet20
from .sizes import check_sizes
from .transformer import GPT, ViT, gpt_small, vit_small

__all__ = [
    "GPT",
    "DenseNet",
    "MobileNetV1",
    "ResNet",
    "ViT",
    "available_models",
    "create",
    "densenet40_24",
    "gpt_small",
    "mobilenet_v1",
    "resnet8",
    "resnet20",
    "vit_small",
]

TIMM = "timm/"

_MODELS = {
    "resnet20": resnet20,
    "resnet8": resnet8,
    "mobilenet_v1": mobilenet_v1,
    "densenet40_24": densenet40_24,
    "vit_small": vit_small,
    "gpt_small": gpt_small,
}


def available_models() -> list[str]:
    """Return the names of the networks of this module, for `create`.

    `create` also accepts `timm/NAME` for each model of timm, and `package.module:factory` for a
    network of your own.

    Example:
        >>> available_models()
        ['resnet20', 'resnet8', 'mobilenet_v1', 'densenet40_24', 'vit_small', 'gpt_small']
    """
    return list(_MODELS)


def create(name: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """Create a network by name, with random initial weights.

    Args:
        name: one of `available_models()`; `timm/NAME`; or `package.module:factory`, which is
            imported and called with those of the two keywords that it takes.
        num_classes: number of classes.
        in_channels: channels of an image.

    Raises:
        ConfigurationError: the name is unknown, a number is below 1, or a factory of your own fails
            or returns no module.
        ImportError: the name is `timm/NAME` and timm is not installed.

    Example:
        >>> import torch
        >>> model = create("resnet8", num_classes=10, in_channels=1)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    check_sizes(num_classes, in_channels)
    if name.startswith(TIMM):
        return create_timm(name, num_classes=num_classes, in_chans=in_channels)
    if is_import_path(name):
        return _create_own(name, {"num_classes": num_classes, "in_channels": in_channels})
    if name not in _MODELS:
        near = f"; did you mean {TIMM + name!r}?" if _is_timm(name) else nearest(name, _MODELS)
        raise ConfigurationError(
            f"unknown network {name!r}{near} Available: {', '.join(_MODELS)}, timm/NAME, and "
            "package.module:factory."
        )
    return _MODELS[name](num_classes, in_channels)


def _create_own(name: str, sizes: dict[str, int]) -> nn.Module:
    """Return the network of a factory of the user."""
    factory = import_object(name, "Network")
    try:
        network = factory(**accepted(factory, sizes))
    except ConfigurationError:
        raise
    except Exception as error:  # of the user's code
        first = (str(error).splitlines() or [""])[0]
        raise ConfigurationError(
            f"Network {name!r}: its factory failed ({type(error).__name__}: {first}). It is called "
            "with those of the keywords num_classes and in_channels that it takes."
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigurationError(
            f"Network {name!r}: its factory returned {type(network).__name__}. Return a "
            "torch.nn.Module that maps images (B, C, H, W) to logits (B, num_classes)."
        )
    return network


def create_pretrained(name: str, **options: Any) -> nn.Module:
    """Create a model of timm with its published weights, from the hub or the local cache.

    Args:
        name: `timm/NAME`.
        options: keyword arguments of `timm.create_model`.

    Raises:
        ConfigurationError: timm has no such model, or no weights for it; or they cannot be read or
            downloaded.
        ImportError: timm is not installed.

    Example:
        >>> create_pretrained("timm/resnet81")
        Traceback (most recent call last):
        torch_feather.errors.ConfigurationError: timm has no model 'resnet81'; did you mean ...
    """
    short = _timm_model(name)
    settings = published_settings(name)
    if not any(settings.get(key) for key in ("hf_hub_id", "url", "file")):
        raise ConfigurationError(
            f"timm has no published weights of {short!r}. timm.list_pretrained() lists all."
        )
    try:
        return create_timm(name, pretrained=True, **options)
    except ConfigurationError:
        raise
    except Exception as error:  # of the hub's client, of requests, or of a damaged file
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigurationError(
            f"timm's weights of {short} cannot be loaded ({first}). Download them on a machine "
            "with a connection, and pass the file with --init."
        ) from error


def published_settings(name: str) -> dict[str, Any]:
    """Return what timm knows of a model's weights: source, image size, normalization, ...

    Args:
        name: `timm/NAME`.

    Returns:
        The model's `pretrained_cfg`; empty if there is none.

    Raises:
        ConfigurationError: timm has no such model.
        ImportError: timm is not installed.

    Example:
        >>> published_settings("timm/resnet18")["input_size"]
        (3, 224, 224)
    """
    short = _timm_model(name)
    from timm.models import get_pretrained_cfg

    try:
        found = get_pretrained_cfg(short)
    except RuntimeError:  # no weights with this tag
        found = None
    return {} if found is None else found.to_dict()


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
    timm = import_timm(name)
    return timm.create_model(_timm_model(name), **options)


def _timm_model(name: str) -> str:
    """Return timm's name of a model.

    Raises:
        ConfigurationError: timm has no model of this name.
    """
    timm = import_timm(name)
    short = name.removeprefix(TIMM)
    if not timm.is_model(short):
        raise ConfigurationError(
            f"timm has no model {short!r}{nearest(short, timm.list_models())} "
            "timm.list_models() lists all models."
        )
    return short


def _is_timm(name: str) -> bool:
    try:
        return bool(import_timm(name).is_model(name))
    except ImportError:
        return False


def import_timm(name: str) -> Any:
    """Return the package timm.

    Args:
        name: the network that requires it, for the message.

    Raises:
        ImportError: it is not installed; the message says how to install it.

    Example:
        >>> import_timm("timm/resnet18").__name__
        'timm'
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"network {name!r} requires timm. {install_hint('vision')}") from error
    return timm
