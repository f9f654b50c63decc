"""Mixup and CutMix by torchvision: batches of mixed images and labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import install_hint
from .config import DataConfig
from .data import Batch


class Mixing:
    """Mixes the images of a batch, and their labels in the same proportion.

    With both alphas above 0, each batch takes Mixup or CutMix with probability 1/2. The random
    numbers are those of PyTorch, whose state is in the checkpoints.

    Args:
        config: alphas of both.
        classes: number of classes.
        one_hot: whether the labels have one number per class already.

    Raises:
        ImportError: torchvision is not installed.

    Example:
        >>> mixing = Mixing(DataConfig(mixup=0.2), classes=3, one_hot=False)
        >>> batch = mixing(Batch(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]), total=4))
        >>> batch.y.shape, batch.y.sum(1).allclose(torch.ones(4))
        (torch.Size([4, 3]), True)
    """

    def __init__(self, config: DataConfig, classes: int, one_hot: bool) -> None:
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise ImportError(
                f"data.mixup and data.cutmix require torchvision. {install_hint('vision')}"
            ) from error
        number = None if one_hot else classes
        kinds: list[Any] = []
        if config.mixup:
            kinds.append(v2.MixUp(alpha=config.mixup, num_classes=number))
        if config.cutmix:
            kinds.append(v2.CutMix(alpha=config.cutmix, num_classes=number))
        self.mix = kinds[0] if len(kinds) == 1 else v2.RandomChoice(kinds)

    def __call__(self, batch: Batch) -> Batch:
        """Return the mixed batch; labels are float32 (B, classes)."""
        if len(batch.y) == 0:
            return batch
        last = batch.x.is_contiguous(memory_format=torch.channels_last)
        x, y = self.mix(batch.x, batch.y)
        layout = torch.channels_last if last else torch.contiguous_format
        return Batch(x.contiguous(memory_format=layout), y.float(), batch.total)


def make_mixing(config: DataConfig, classes: int, labels: Tensor) -> Mixing | None:
    """Return the mixing of a configuration; None if it has none.

    Args:
        config: the data set.
        classes: number of classes.
        labels: labels of the training images.

    Raises:
        ImportError: torchvision is required and not installed.

    Example:
        >>> make_mixing(DataConfig(), 10, torch.zeros(4, dtype=torch.int64)) is None
        True
    """
    if not (config.mixup or config.cutmix):
        return None
    return Mixing(config, classes, one_hot=labels.ndim == 2)
