"""Knowledge distillation: a trained network, the teacher, says what the classes of an image are.

Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from ..errors import ConfigurationError
from .config import Config, DistillationConfig
from .data import Dataset
from .weights import read_weights


class Distillation:
    """The loss of a network that learns from labels and from a teacher.

    Attributes:
        teacher: in evaluation mode; nothing changes it.
        digest: of all that it computes with, to tell one teacher from another.
    """

    def __init__(
        self, teacher: nn.Module, options: DistillationConfig, compiled: bool = False
    ) -> None:
        self.teacher, self.options = teacher.eval().requires_grad_(False), options
        self.digest = _digest(teacher)
        self.network: nn.Module = teacher
        if compiled:
            self.network = torch.compile(teacher, dynamic=False)  # type: ignore[assignment]

    def __call__(self, loss: Tensor, logits: Tensor, x: Tensor, whole: bool = True) -> Tensor:
        """(1 - a) loss + a T^2 KL(teacher || student), both softened by the temperature T.

        Args:
            loss: on the labels, 0-dimensional.
            logits: of the student, (B, classes).
            x: the images that gave them, (B, C, H, W).
            whole: whether these are as many as most times; for others nothing is compiled.
        """
        temperature = self.options.temperature
        with torch.no_grad():
            wanted = (self.network if whole else self.teacher)(x).float() / temperature
        divergence = F.kl_div(
            (logits.float() / temperature).log_softmax(1),
            wanted.log_softmax(1),
            reduction="batchmean",
            log_target=True,
        )
        return loss.lerp(divergence * temperature**2, self.options.weight)


def load_teacher(config: Config, data: Dataset) -> nn.Module:
    """The network that `config.distillation.teacher` names, on the CPU.

    What a run or a file says of itself decides which network it is; weights that say nothing are
    those of the network in training. The random numbers of the caller stay what they are.

    Raises:
        ConfigurationError: it does not take the images of `data`, or knows other classes.
        FeatherError: it cannot be read.
    """
    source = str(config.distillation.teacher)
    with torch.random.fork_rng(devices=[]):
        if source.startswith(models.TIMM):
            teacher = _pretrained(source, data)
        else:
            weights = read_weights(Path(source))
            name = weights.network or config.network
            teacher = weights.fill(models.create(name, data.classes, data.channels))
    _try(teacher.eval(), source, data)
    return teacher


class Renormalized(nn.Module):
    """A network that is used to images of another mean and deviation than it is given."""

    scale: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, data: Dataset, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        given, deviation = torch.tensor(data.mean), torch.tensor(data.std)
        self.register_buffer("scale", (deviation / std).reshape(-1, 1, 1))
        self.register_buffer("offset", ((given - mean) / std).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images as the data set normalises them."""
        return self.network(x * self.scale + self.offset)


def _pretrained(source: str, data: Dataset) -> nn.Module:
    """A network of timm with the classes and weights that it was published with."""
    network: Any = models.create_timm(source, pretrained=True)
    mean, std = (torch.tensor(network.pretrained_cfg[key]) for key in ("mean", "std"))
    if len(mean) != data.channels:
        raise _unfit(source, data, f"it wants {len(mean)} channels")
    return Renormalized(network, data, mean, std)


def _try(teacher: nn.Module, source: str, data: Dataset) -> None:
    try:
        with torch.no_grad():
            logits = teacher(data.example())
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise _unfit(source, data, first) from None
    if logits.shape != (1, data.classes):
        raise ConfigurationError(
            f"distillation.teacher: {source} tells {logits.shape[-1]} classes apart, {data.name} "
            f"has {data.classes}; a teacher must have been trained on the same classes"
        )


def _unfit(source: str, data: Dataset, reason: str) -> ConfigurationError:
    size = "x".join(map(str, data.example().shape[1:]))
    return ConfigurationError(
        f"distillation.teacher: {source} does not take images of {size}: {reason}"
    )


def _digest(teacher: nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in teacher.state_dict().items():
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
