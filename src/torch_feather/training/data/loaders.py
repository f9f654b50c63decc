"""The loaders of a run, as its configuration asks for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..config import Config
from .dataset import Dataset, Images
from .epochs import Epochs
from .memory import EvalLoader, TrainLoader

if TYPE_CHECKING:
    from ..distributed import Ranks


def train_loader(
    data: Dataset, config: Config, device: torch.device, ranks: Ranks | None = None
) -> Epochs:
    """Augmented batches of the training images; of each, this rank's part."""
    rank, count = (ranks.rank, ranks.count) if ranks else (0, 1)
    return TrainLoader(
        data,
        config.data,
        config.batch_size,
        config.seed,
        device,
        config.system.channels_last,
        rank,
        count,
    )


def eval_loader(
    data: Dataset,
    images: Images,
    config: Config,
    device: torch.device,
    ranks: Ranks | None = None,
) -> EvalLoader:
    """This rank's part of `images`, as evaluation sees them."""
    rank, count = (ranks.rank, ranks.count) if ranks else (0, 1)
    return EvalLoader(
        data, images, device, channels_last=config.system.channels_last, rank=rank, ranks=count
    )
