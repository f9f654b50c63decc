"""How early the mask becomes what it will be: its correlation with the final one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_ONES = np.array([bin(byte).count("1") for byte in range(256)])  # set bits of each byte


def mask_file(run: Path, epoch: int) -> Path:
    """Where the run directory `run` keeps the mask at the end of that epoch, counted from 1."""
    return run / "masks" / f"{epoch:04d}.npy"


def read_masks(run: Path, epochs: int) -> list[np.ndarray] | None:
    """The masks of all epochs as packed bits, uint8; None where not every one was recorded."""
    files = [mask_file(run, epoch) for epoch in range(1, epochs + 1)]
    if not all(file.exists() for file in files):
        return None
    return [np.load(file, allow_pickle=False) for file in files]


def correlations(masks: Sequence[np.ndarray], weights: int) -> list[float]:
    """Pearson correlation of each mask with the last one.

    Of 0/1 variables it follows from three counts: how many weights each mask keeps, and how many
    both keep. Source of the measure: the Feather supplement, section 3 and figure 2.

    Args:
        masks: packed bits (`np.packbits`), uint8, a bit for each weight, set where it is kept.
        weights: how many there are; the last byte may have bits beyond, which are 0.

    Returns:
        A number in [-1, 1] for each mask; nan where a mask keeps all or nothing, since what does
        not vary correlates with nothing.
    """
    final = masks[-1]
    return [_pearson(_count(m), _count(final), _count(m & final), weights) for m in masks]


def _count(mask: np.ndarray) -> int:
    return int(_ONES[mask].sum())


def _pearson(a: int, b: int, both: int, n: int) -> float:
    variances = a * (n - a) * b * (n - b)
    return (n * both - a * b) / math.sqrt(variances) if variances else math.nan
