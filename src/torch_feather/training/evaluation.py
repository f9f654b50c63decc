"""Loss and accuracy of a network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import Ranks
from .precision import autocast


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    amp: bool = False,
    ranks: Ranks | None = None,
    compiled: nn.Module | None = None,
) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers, with the model in evaluation mode.

    With `ranks`, each has batches of its own, and the means are over the images of all.
    `compiled`, the model compiled for one shape, is called on all batches but a smaller last one.
    """
    training, size = model.training, 0
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right answers, images
    for x, y in batches:
        size = size or len(y)
        network = compiled if compiled is not None and len(y) == size else model
        with autocast(device, amp):
            logits = network(x).float()
        totals[0] += F.cross_entropy(logits, y, reduction="sum")
        totals[1] += (logits.argmax(1) == y).sum()
        totals[2] += len(y)
    model.train(training)
    loss, right, images = (ranks or Ranks()).sum(totals).tolist()
    return loss / images, right / images
