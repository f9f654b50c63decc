"""Stability of the mask during training: its correlation with the final mask."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import FileFormatError

REMEDY = "Move the folder masks away: figures and tables are then made without it."
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


def read_masks(run: Path, epochs: int, weights: int | None = None) -> list[np.ndarray] | None:
    """Return the masks of all epochs of a run.

    Args:
        run: run directory.
        epochs: number of epochs.
        weights: number of weights; None if it is not known.

    Returns:
        Packed bits (uint8) for each epoch, or None if a mask is missing.

    Raises:
        FileFormatError: a file is damaged, or is not a mask of so many weights.

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
    if not all(os.path.lexists(file) for file in files):
        return None
    masks = [_read_mask(file) for file in files]
    size = len(masks[0]) if weights is None and masks else -(-(weights or 0) // 8)
    for file, mask in zip(files, masks, strict=True):
        if len(mask) != size:
            raise FileFormatError(
                f"{file}: cannot be used: {len(mask)} bytes instead of {size}. {REMEDY}"
            )
        if weights is not None and weights % 8 and mask[-1] & (0xFF >> weights % 8):
            raise FileFormatError(f"{file}: cannot be used: bits after the last weight. {REMEDY}")
    return masks


def _read_mask(file: Path) -> np.ndarray:
    try:
        if not file.is_file():  # opening a named pipe would wait for a writer
            raise ValueError("not a regular file")
        # A memory map is bounded by the file, whatever shape its header names.
        mask = np.array(np.load(file, allow_pickle=False, mmap_mode="r"))
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise FileFormatError(f"{file}: cannot be used: {reason}. {REMEDY}") from None
    if mask.dtype != np.uint8 or mask.ndim != 1:
        raise FileFormatError(
            f"{file}: cannot be used: {mask.dtype} of {mask.ndim} dimensions. {REMEDY}"
        )
    return mask


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
