"""Scanned digits, which come with scikit-learn."""

from __future__ import annotations

import numpy as np

from ..errors import DataError
from .dataset import Arrays


def read_digits(path: str | None) -> tuple[Arrays, Arrays]:
    """1,797 scans of 8x8 pixels; a fifth, the same whatever the seed, is the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the digits data needs scikit-learn: pip install 'torch-feather[train]'"
        ) from None
    bunch = load_digits()
    pixels = (bunch.images * 15).astype(np.uint8)[..., None]  # 0..16 to 0..240
    labels = bunch.target.astype(np.int64)
    order = np.random.RandomState(0).permutation(len(labels))
    cut = len(labels) // 5
    test, train = order[:cut], order[cut:]
    return (pixels[train], labels[train]), (pixels[test], labels[test])
