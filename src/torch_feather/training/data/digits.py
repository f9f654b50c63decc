"""The digits data set of scikit-learn."""

from __future__ import annotations

import numpy as np

from ...errors import install_hint
from ..errors import DataError
from .dataset import Arrays


def read_digits(path: str | None) -> tuple[Arrays, Arrays]:
    """Return training and test images: 1,797 scans of 8x8 pixels, a fifth of them for testing.

    Args:
        path: not used.

    Raises:
        DataError: scikit-learn is not installed.

    Returns:
        Pixels and labels of both: uint8 (N, 8, 8, 1) from 0 to 240, and int64 (N,) from 0 to 9.

    Example:
        >>> (pixels, labels), (test_pixels, test_labels) = read_digits(None)
        >>> pixels.shape, test_pixels.shape, int(labels.max())
        ((1438, 8, 8, 1), (359, 8, 8, 1), 9)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(f"digits requires scikit-learn. {install_hint('train')}") from None
    bunch = load_digits()
    pixels = (bunch.images * 15).astype(np.uint8)[..., None]  # 0..16 to 0..240
    labels = bunch.target.astype(np.int64)
    # A fixed seed: the test set is the same for all runs.
    order = np.random.RandomState(0).permutation(len(labels))
    test_images = len(labels) // 5
    test, train = order[:test_images], order[test_images:]
    return (pixels[train], labels[train]), (pixels[test], labels[test])
