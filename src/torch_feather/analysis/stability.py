"""Stability of the mask during training: its correlation with the final mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_ONES = np.array([bin(byte).count("1") for byte in range(256)])  # set bits of each byte


def mask_file(run: Path, epoch: int) -> Path:
    """Return the path of the mask at the end of an epoch.

    Args:
        run: run directory.
        epoch: epoch, counted from 1.

    Example:
        >>> mask_file(Path("runs/a"), 3).as_posix()
        'runs/a/masks/0003.npy'
    """
    return run / "masks" / f"{epoch:04d}.npy"


def read_masks(run: Path, epochs: int) -> list[np.ndarray] | None:
    """Return the masks of all epochs of a run.

    Args:
        run: run directory.
        epochs: number of epochs.

    Returns:
        Packed bits (uint8) for each epoch, or None if a mask is missing.

    Example:
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> (run / "masks").mkdir()
        >>> for epoch in (1, 2):
        ...     np.save(mask_file(run, epoch), np.packbits([1, 0, 1, 0, 0, 0, 0, epoch - 1]))
        >>> [mask.tolist() for mask in read_masks(run, epochs=2)]
        [[160], [161]]
        >>> read_masks(run, epochs=3) is None  # there is no mask of epoch 3
        True
    """
    files = [mask_file(run, epoch) for epoch in range(1, epochs + 1)]
    if not all(file.exists() for file in files):
        return None
    return [np.load(file, allow_pickle=False) for file in files]


def correlations(masks: Sequence[np.ndarray], weights: int) -> list[float]:
    """Compute the Pearson correlation of each mask with the last one.

    For 0/1 variables it follows from three counts: the weights that each mask keeps, and the
    weights that both keep. The measure is that of the Feather supplement (section 3, figure 2).

    Args:
        masks: packed bits (`np.packbits`, uint8), one bit for each weight, set if it is kept.
        weights: number of weights; further bits of the last byte must be 0.

    Returns:
        A number in [-1, 1] for each mask. NaN if a mask keeps all weights or none, because the
        correlation of a constant is undefined.

    Example:
        >>> masks = np.packbits([[1, 1, 1, 0], [1, 0, 1, 0]], axis=1)
        >>> [round(r, 3) for r in correlations(masks, weights=4)]
        [0.577, 1.0]
    """
    final = masks[-1]
    return [_pearson(_count(m), _count(final), _count(m & final), weights) for m in masks]


def _count(mask: np.ndarray) -> int:
    return int(_ONES[mask].sum())


def _pearson(a: int, b: int, both: int, n: int) -> float:
    variances = a * (n - a) * b * (n - b)
    return (n * both - a * b) / math.sqrt(variances) if variances else math.nan
