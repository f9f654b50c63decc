"""Losses of a run, and what labels they require."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..import_path import import_object, is_import_path
from .config import Config
from .data import Dataset

Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps logits (B, classes) and labels, (B,) or (B, classes), to the mean loss, 0-dimensional.

Of a text, logits are (B, T, classes) and labels (B, T).
"""


def make_loss(config: Config, *, training: bool = True) -> Loss:
    """Return the loss of a run.

    Args:
        config: its configuration.
        training: whether labels are smoothed, as `optimizer.label_smoothing` says.

    Raises:
        ConfigurationError: a function of the user cannot be imported.

    Example:
        >>> import torch
        >>> loss = make_loss(Config(loss="binary"))
        >>> loss(torch.zeros(2, 3), torch.ones(2, 3))
        tensor(0.6931)
    """
    smoothing = config.optimizer.label_smoothing if training else 0.0
    if is_import_path(config.loss):
        return import_object(config.loss, "Loss")
    if config.loss == "binary":

        def binary(logits: Tensor, labels: Tensor) -> Tensor:
            labels = labels if smoothing == 0 else labels.lerp(labels.new_tensor(0.5), smoothing)
            return F.binary_cross_entropy_with_logits(logits, labels)

        return binary

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        labels = labels.flatten(0, logits.ndim - 2)  # the characters of all windows
        return F.cross_entropy(logits.flatten(0, -2), labels, label_smoothing=smoothing)

    return cross_entropy


def check_outputs(model: nn.Module, config: Config, data: Dataset, example: Tensor) -> None:
    """Raise an error if network, loss and labels do not fit each other.

    Args:
        model: the network; its training mode is restored.
        config: the configuration of the run.
        data: its data set.
        example: an image, (1, C, H, W), or a window, (1, T).

    Raises:
        ConfigurationError: the network does not return one logit per class; one label per image is
            required, or several; or a function of the user returns no mean loss.

    Example:
        >>> from .data import load_dataset
        >>> config = Config(loss="binary")
        >>> data = load_dataset(config.data, 0)
        >>> try:
        ...     check_outputs(nn.Flatten(), config, data, data.example())
        ... except ConfigurationError as error:
        ...     print(error)
        loss=binary requires several labels per image, but digits has one. Set loss=cross-entropy.
    """
    several = data.multi_label
    if config.loss == "binary" and not several:
        raise ConfigurationError(
            f"loss=binary requires several labels per image, but {data.name} has one. Set "
            "loss=cross-entropy."
        )
    if config.loss == "cross-entropy" and several:
        raise ConfigurationError(
            f"{data.name} has several labels per image, which loss=cross-entropy does not support. "
            "Set loss=binary."
        )
    if not (is_import_path(config.network) or is_import_path(config.loss)):
        return
    training = model.training
    with torch.no_grad():
        output = model.eval()(example)
    model.train(training)
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    positions = () if several else tuple(data.test.labels.shape[1:])
    if shape != (1, *positions, data.classes):
        expected = ", ".join(map(str, ("B", *positions, data.classes)))
        raise ConfigurationError(
            f"network {config.network!r} must return logits of shape ({expected}), one per "
            f"class, but returns {shape} for one image. Build its head for "
            f"num_classes={data.classes}."
        )
    if is_import_path(config.loss):
        _try_loss(config, output.float(), data.test.labels[:1].to(output.device))


def _try_loss(config: Config, logits: Tensor, labels: Tensor) -> None:
    """Raise an error if a loss of the user fails or returns no mean."""
    try:
        found = make_loss(config)(logits, labels)
    except Exception as error:  # of the user's code
        first = (str(error).splitlines() or [""])[0]
        raise ConfigurationError(
            f"loss={config.loss}: the function failed ({type(error).__name__}: {first}). It is "
            "called with logits (B, classes) and labels."
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 0:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigurationError(
            f"loss={config.loss}: the function returned {shape}. Return the mean loss of the "
            "batch, a 0-dimensional tensor."
        )
