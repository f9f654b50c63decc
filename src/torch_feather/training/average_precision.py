"""Mean average precision of images with several labels."""

from __future__ import annotations

import torch
from torch import Tensor

ACCURACY, MEAN_AVERAGE_PRECISION = "accuracy", "mAP"


def measure_name(multi_label: object) -> str:
    """Return the name of what reports hold as `test_accuracy`.

    Args:
        multi_label: the value of `multi_label` in report.json; true if images have several labels.

    Example:
        >>> measure_name(None), measure_name(True)
        ('accuracy', 'mAP')
    """
    return MEAN_AVERAGE_PRECISION if multi_label is True else ACCURACY


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Return the average precision of a class: the sum of precision times gain in recall.

    Images of equal scores count together, as in scikit-learn.

    Args:
        scores: scores of the images, (N,).
        positive: whether each image has the class, (N,); at least one has.

    Example:
        >>> average_precision(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True]))
        0.8333333333333333
    """
    order = scores.argsort(descending=True)
    scores, found = scores[order], positive[order].double().cumsum(0)
    last = torch.ones_like(positive)
    last[:-1] = scores[:-1] != scores[1:]  # the last image of each score
    precision = found / torch.arange(1, len(found) + 1, dtype=found.dtype, device=found.device)
    gain = found[last].diff(prepend=found.new_zeros(1)) / found[-1]
    return min(float((gain * precision[last]).sum()), 1.0)  # a sum may be rounded up


def mean_average_precision(scores: Tensor, labels: Tensor) -> float:
    """Return the mean of the average precision over the classes.

    Classes that no image has are left out. If no image has a class, the result is 0.

    Args:
        scores: scores of the images, (N, classes), such as logits.
        labels: zeros and ones, (N, classes).

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
        >>> labels = torch.tensor([[1, 0], [0, 0], [1, 1]])
        >>> round(mean_average_precision(scores, labels), 4)  # (0.8333 + 1) / 2
        0.9167
    """
    positive = labels > 0.5
    classes = positive.any(0).nonzero()[:, 0].tolist()
    found = [average_precision(scores[:, i], positive[:, i]) for i in classes]
    return sum(found) / len(found) if found else 0.0
