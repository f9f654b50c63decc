"""Create the loaders of a run from its configuration."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..config import Config, SystemConfig
from ..distributed import Ranks
from .dataset import Dataset, EncodedImages, Images, Text
from .epochs import Epochs, InOrder
from .memory import EvalLoader, TrainLoader
from .stream import StreamEvalLoader, StreamTrainLoader
from .text import TextEvalLoader, TextTrainLoader


def train_loader(
    data: Dataset, config: Config, device: torch.device, ranks: Ranks | None = None
) -> Epochs:
    """Return a loader of shuffled and augmented training batches.

    Args:
        data: the data set.
        config: the configuration of the run.
        device: the device to train on.
        ranks: the processes that train together; the loader yields this rank's part of a batch.

    Example:
        >>> from ..config import DataConfig
        >>> from .load import load_dataset
        >>> data = load_dataset(DataConfig("digits"), seed=0)
        >>> batch = next(iter(train_loader(data, Config(batch_size=32), torch.device("cpu"))))
        >>> batch.x.shape
        torch.Size([32, 1, 8, 8])
    """
    arguments = (data, config.data, config.batch_size, config.seed, device)
    options: dict[str, Any] = {"channels_last": config.system.channels_last, "ranks": ranks}
    if isinstance(data.train, Images):
        return TrainLoader(*arguments, **options)
    if isinstance(data.train, Text):
        return TextTrainLoader(*arguments, **options)
    return StreamTrainLoader(*arguments, **options, workers=workers(config.system))


def eval_loader(
    data: Dataset,
    images: Images | EncodedImages | Text,
    config: Config,
    device: torch.device,
    ranks: Ranks | None = None,
) -> InOrder:
    """Return a loader of evaluation batches (x, y): images in order, without augmentation.

    Args:
        data: the data set.
        images: its images to evaluate, such as `data.test`.
        config: the configuration of the run.
        device: the device to evaluate on.
        ranks: the processes that evaluate together; the loader yields this rank's part.

    Example:
        >>> from ..config import DataConfig
        >>> from .load import load_dataset
        >>> data = load_dataset(DataConfig("digits"), seed=0)
        >>> loader = eval_loader(data, data.test, Config(), torch.device("cpu"))
        >>> sum(len(y) for _, y in loader)
        359
    """
    options: dict[str, Any] = {"channels_last": config.system.channels_last, "ranks": ranks}
    if isinstance(images, Images):
        return EvalLoader(data, images, device, **options)
    if isinstance(images, Text):
        return TextEvalLoader(data, images, device, **options)
    return StreamEvalLoader(data, images, device, **options, workers=workers(config.system))


def workers(system: SystemConfig) -> int:
    """Return the number of decoding processes: by default 1 per core of this process, at most 8.

    Args:
        system: its `workers` is returned if it is not None.

    Example:
        >>> workers(SystemConfig(workers=3)), 1 <= workers(SystemConfig()) <= 8
        (3, True)
    """
    if system.workers is not None:
        return system.workers
    affinity = getattr(os, "sched_getaffinity", None)  # Linux assigns cores to processes
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
