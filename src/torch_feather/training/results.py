"""Entries of report.json: what was trained, by what, and the results of the teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .data import Dataset
from .distillation import Distillation
from .distributed import Ranks
from .evaluation import evaluate
from .network_info import info_of_data
from .provenance import provenance


def report_entries(
    config: Config, data: Dataset, digest: str, device: torch.device, ranks: Ranks
) -> dict[str, Any]:
    """Return what was trained, and by which software and hardware.

    Args:
        config: the configuration of the run.
        data: its data set.
        digest: the digest of the data set.
        device: the device that trained.
        ranks: the processes that trained together.

    Example:
        >>> from .data import load_dataset
        >>> config = Config(network="resnet8")
        >>> data = load_dataset(config.data, 0)
        >>> entries = report_entries(config, data, "", torch.device("cpu"), Ranks())
        >>> entries["network"], entries["classes"], entries["input_shape"]
        ('resnet8', 10, [1, 8, 8])
    """
    entries = {
        **info_of_data(config, data).entries(),
        "data": config.data.name,
        "data_digest": digest,
        "method": config.method,
        "target_sparsity": config.sparsity,
        "seed": config.seed,
        **provenance(device),
    }
    if config.method_reason is not None:
        entries["method_reason"] = config.method_reason
    if ranks.count > 1:
        entries["hardware"]["processes"] = ranks.count
    return entries


def teacher_entry(
    config: Config,
    distillation: Distillation | None,
    images: Iterable[tuple[Tensor, Tensor]],
    ranks: Ranks,
) -> dict[str, Any] | None:
    """Return where the teacher came from, and its loss and accuracy; None without a teacher.

    Args:
        config: the configuration of the run.
        distillation: its distillation.
        images: test images and labels, each process its own.
        ranks: the processes.

    Example:
        >>> from .config import DistillationConfig
        >>> teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False))
        >>> options = DistillationConfig(teacher="runs/dense")
        >>> images, labels = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 1, 1])
        >>> entry = teacher_entry(
        ...     Config(distillation=options),
        ...     Distillation(teacher, options),
        ...     [(images, labels)],
        ...     Ranks(),
        ... )
        >>> entry["source"], entry["test_accuracy"]
        ('runs/dense', 0.25)
    """
    if distillation is None:
        return None
    loss, accuracy = evaluate(distillation.teacher, images, config.system.amp, ranks)
    return {
        "source": config.distillation.teacher,
        "sha256": distillation.digest,
        "test_accuracy": accuracy,
        "test_loss": loss,
    }
