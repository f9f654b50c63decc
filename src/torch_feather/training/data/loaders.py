"""The loaders of a run, as its configuration asks for them."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..config import Config, SystemConfig
from ..distributed import Ranks
from .dataset import Dataset, EncodedImages, Images
from .epochs import Epochs
from .memory import EvalLoader, TrainLoader
from .stream import StreamEvalLoader, StreamTrainLoader


def train_loader(
    data: Dataset, config: Config, device: torch.device, ranks: Ranks | None = None
) -> Epochs:
    """Augmented batches of the training images; of each, this rank's part."""
    arguments = (data, config.data, config.batch_size, config.seed, device)
    options: dict[str, Any] = {"channels_last": config.system.channels_last, "ranks": ranks}
    if isinstance(data.train, Images):
        return TrainLoader(*arguments, **options)
    return StreamTrainLoader(*arguments, **options, workers=workers(config.system))


def eval_loader(
    data: Dataset,
    images: Images | EncodedImages,
    config: Config,
    device: torch.device,
    ranks: Ranks | None = None,
) -> EvalLoader | StreamEvalLoader:
    """This rank's part of `images`, as evaluation sees them: batches (x, y)."""
    options: dict[str, Any] = {"channels_last": config.system.channels_last, "ranks": ranks}
    if isinstance(images, Images):
        return EvalLoader(data, images, device, **options)
    return StreamEvalLoader(data, images, device, **options, workers=workers(config.system))


def workers(system: SystemConfig) -> int:
    """Processes that decode for this one: by default its share of the cores, at most 8."""
    if system.workers is not None:
        return system.workers
    here = getattr(os, "sched_getaffinity", None)  # where cores are assigned to processes
    cores = len(here(0)) if here else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
