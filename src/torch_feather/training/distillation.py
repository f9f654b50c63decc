"""Knowledge distillation: training on the outputs of a trained teacher network.

Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from ..errors import ConfigurationError
from .config import Config, DistillationConfig
from .data import Dataset
from .distributed import Ranks
from .network_info import check_trusted
from .weights import read_weights


class Distillation:
    """The loss of a student network that is trained on labels and on a teacher's outputs.

    Args:
        teacher: the teacher network.
        options: weight and temperature of the loss.
        compiled: whether to compile the teacher.

    Attributes:
        teacher: the teacher in evaluation mode; its weights do not change.
        digest: a hash of the teacher's state dict, which identifies it.

    Example:
        >>> teacher, x = nn.Linear(2, 3), torch.ones(1, 2)
        >>> distillation = Distillation(teacher, DistillationConfig(weight=0.5))
        >>> loss = torch.tensor(2.0)
        >>> distillation(loss, teacher(x), x)  # equal outputs: KL = 0
        tensor(1.)
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
        """Return (1 - a) loss + a T^2 KL(teacher || student), with logits divided by T.

        a is the weight and T the temperature of the options.

        Args:
            loss: loss on the labels, 0-dimensional.
            logits: outputs of the student, (B, classes) or (B, T, classes).
            x: the images, (B, C, H, W), or the windows, (B, T).
            whole: whether the batch has the usual size; others use the uncompiled teacher.
        """
        temperature = self.options.temperature
        with torch.no_grad():
            target = (self.network if whole else self.teacher)(x).float() / temperature
        divergence = F.kl_div(  # a mean over images; of a text, over characters
            (logits.float() / temperature).log_softmax(-1).flatten(0, -2),
            target.log_softmax(-1).flatten(0, -2),
            reduction="batchmean",
            log_target=True,
        )
        return loss.lerp(divergence * temperature**2, self.options.weight)


def make_distillation(
    config: Config, data: Dataset, device: torch.device, layout: torch.memory_format, ranks: Ranks
) -> Distillation | None:
    """Return the loss with the teacher of a configuration; None if it has no teacher.

    Args:
        config: the configuration of the run.
        data: the data set of the run.
        device: device of the teacher.
        layout: memory format of the teacher.
        ranks: the processes that train together.

    Raises:
        FeatherError: as `load_teacher`.

    Example:
        >>> from .data import load_dataset
        >>> data, device = load_dataset(Config().data, seed=0), torch.device("cpu")
        >>> make_distillation(Config(), data, device, torch.contiguous_format, Ranks()) is None
        True
    """
    if config.distillation.teacher is None:
        return None
    teacher = ranks.local_first(lambda: load_teacher(config, data))
    teacher.to(device).to(memory_format=layout)
    return Distillation(teacher, config.distillation, config.system.compile)


def load_teacher(config: Config, data: Dataset) -> nn.Module:
    """Load the network that `config.distillation.teacher` names, on the CPU.

    A run or a sparse file names its own network. Other files are assumed to hold weights of
    `config.network`. The caller's random state does not change.

    Args:
        config: the configuration of the run.
        data: the data set of the run.

    Raises:
        ConfigurationError: the teacher does not accept the images of `data`, or has another
            number of classes.
        FeatherError: the teacher cannot be read.

    Example:
        >>> import tempfile
        >>> from .data import load_dataset
        >>> path = Path(tempfile.mkdtemp()) / "teacher.pt"
        >>> torch.save(models.create("resnet8", 10, 1).state_dict(), path)
        >>> options = DistillationConfig(teacher=str(path))
        >>> config = Config(network="resnet8", distillation=options)
        >>> data = load_dataset(config.data, config.seed)
        >>> load_teacher(config, data)(data.example()).shape
        torch.Size([1, 10])
    """
    source = str(config.distillation.teacher)
    with torch.random.fork_rng(devices=[]):
        if source.startswith(models.TIMM):
            teacher = _pretrained(source, data)
        else:
            weights = read_weights(Path(source))
            name = weights.network or config.network
            check_trusted(name, Path(source), config.network)
            with suppress(NotImplementedError, RuntimeError), torch.device("meta"):
                # Before a network is created that only the file names. A few cannot be on meta.
                weights.check(models.create(name, data.classes, data.channels))
            teacher = weights.fill(models.create(name, data.classes, data.channels))
    _try(teacher.eval(), source, data)
    return teacher


class _Renormalized(nn.Module):
    """A network that expects another normalization than that of the data set.

    Args:
        network: the network.
        data: the data set, with the mean and standard deviation of its normalization.
        mean: the mean that `network` expects, per channel.
        std: the standard deviation that `network` expects, per channel.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, data: Dataset, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        given, deviation = torch.tensor(data.mean), torch.tensor(data.std)
        self.register_buffer("scale", (deviation / std).reshape(-1, 1, 1))
        self.register_buffer("offset", ((given - mean) / std).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images in the data set's normalization."""
        return self.network(x * self.scale + self.offset)


def _pretrained(source: str, data: Dataset) -> nn.Module:
    """Return a timm network with its published classes and weights."""
    network: Any = models.create_timm(source, pretrained=True)
    mean, std = (torch.tensor(network.pretrained_cfg[key]) for key in ("mean", "std"))
    if len(mean) != data.channels:
        raise _unfit(source, data, f"it expects {len(mean)} channels")
    return _Renormalized(network, data, mean, std)


def _try(teacher: nn.Module, source: str, data: Dataset) -> None:
    try:
        with torch.no_grad():
            logits = teacher(data.example())
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise _unfit(source, data, first) from None
    if logits.shape[-1] != data.classes or logits.ndim != 2 + (data.example().ndim == 2):
        raise ConfigurationError(
            f"distillation.teacher: {source} has {logits.shape[-1]} classes, but {data.name} has "
            f"{data.classes}. The teacher must be trained on the same classes."
        )


def _unfit(source: str, data: Dataset, reason: str) -> ConfigurationError:
    size = "x".join(map(str, data.example().shape[1:]))
    return ConfigurationError(
        f"distillation.teacher: {source} does not accept images of {size}: {reason}"
    )


def _digest(teacher: nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in teacher.state_dict().items():
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
