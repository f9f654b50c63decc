"""The parts of an image on which an answer depends, by occlusion (Zeiler and Fergus, ECCV 2014)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

POSITIONS = 7  # of the patch, along each side
PART = 4  # the patch covers this part of each side
BATCH = 25  # images per forward pass


@torch.no_grad()
def occlusion(model: nn.Module, image: Tensor, answer: int) -> Tensor:
    """Return by how much the log-odds of an answer fall if a part of the image is hidden.

    A gray patch of a quarter of each side is moved over the image in 7 x 7 positions. Each pixel
    has the mean over the positions that hide it.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); its training mode is restored.
        image: a normalized image, (1, C, H, W), in which 0 is the mean color.
        answer: the class.

    Returns:
        float32 (H, W) on the CPU. Positive where the image speaks for the answer.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
        >>> weight = torch.zeros(2, 64)
        >>> weight[1, :8] = 1.0  # class 1 depends on the first row
        >>> _ = model[1].load_state_dict({"weight": weight})
        >>> found = occlusion(model, torch.ones(1, 1, 8, 8), answer=1)
        >>> bool(found[0].min() > 0), found[2:].abs().max()
        (True, tensor(0.))
    """
    training = model.training
    model.eval()
    height, width = image.shape[2:]
    tall, wide = -(-height // PART), -(-width // PART)
    boxes = [
        (slice(top, top + tall), slice(left, left + wide))
        for top in _starts(height - tall)
        for left in _starts(width - wide)
    ]
    whole = _log_odds(model(image), answer)
    total = torch.zeros(height, width)
    covered = torch.zeros(height, width)
    for first in range(0, len(boxes), BATCH):
        part = boxes[first : first + BATCH]
        hidden = image.repeat(len(part), 1, 1, 1).contiguous(memory_format=torch.channels_last)
        for one, (rows, columns) in zip(hidden, part, strict=True):
            one[:, rows, columns] = 0
        drops = (whole - _log_odds(model(hidden), answer)).float().cpu()
        for drop, box in zip(drops, part, strict=True):
            total[box] += drop
            covered[box] += 1
    model.train(training)
    return total / covered


def _starts(last: int) -> list[int]:
    """Return the positions of the patch along a side, without repetitions."""
    return sorted(set(np.linspace(0, last, POSITIONS).round().astype(int).tolist()))


def _log_odds(logits: Tensor, answer: int) -> Tensor:
    """Return log(p / (1 - p)) of the answer, (B,). Unlike p, it does not saturate near 1."""
    others = logits.clone()
    others[:, answer] = -torch.inf
    return logits[:, answer] - others.logsumexp(1)
