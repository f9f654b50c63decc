"""The mask after each epoch, for `torch_feather.analysis.stability`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..analysis.stability import mask_file
from .checkpoint import write_atomically


def record_masks(masks: Iterable[Tensor], run: Path, epoch: int) -> None:
    """Write the mask of an epoch into a run directory, one bit per weight.

    A run that is killed and resumed computes the same masks and writes the same file again.

    Args:
        masks: masks of the prunable weights, bool, in the order of `Sparsifier.masks()`.
        run: the run directory.
        epoch: the epoch that ended, from 1.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> record_masks([torch.tensor([True, False]), torch.tensor([True])], run, epoch=1)
        >>> np.load(mask_file(run, 1))  # bits 101
        array([160], dtype=uint8)
    """
    kept = torch.cat([mask.flatten() for mask in masks]).cpu().numpy()
    path = mask_file(run, epoch)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda file: np.save(file, np.packbits(kept)))
