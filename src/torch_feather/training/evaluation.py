"""Loss and accuracy of a network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..measure.flops import count_flops
from .average_precision import mean_average_precision
from .config import Config
from .distributed import Ranks
from .precision import autocast

T = TypeVar("T")
Loss = Callable[[Tensor, Tensor], Tensor]


class StoppedEvaluation(Exception):  # noqa: N818
    """A stop was requested during an evaluation.

    Example:
        >>> try:
        ...     list(until(lambda: True, [1, 2]))
        ... except StoppedEvaluation:
        ...     print("stopped")
        stopped
    """


def until(stop_requested: Callable[[], bool], batches: Iterable[T]) -> Iterator[T]:
    """Yield the batches.

    Raises:
        StoppedEvaluation: `stop_requested` returned true before a batch.

    Example:
        >>> list(until(lambda: False, [1, 2]))
        [1, 2]
    """
    for batch in batches:
        if stop_requested():
            raise StoppedEvaluation
        yield batch


def check_accepts(model: nn.Module, name: str, example: Tensor) -> None:
    """Check that a network accepts an image.

    Args:
        model: the network.
        name: its name, for the message.
        example: the image, (1, C, H, W).

    Raises:
        ConfigurationError: it does not.

    Example:
        >>> check_accepts(nn.Conv2d(1, 8, 3), "net", torch.zeros(1, 1, 8, 8))
    """
    try:
        count_flops(model, example)
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        size = "x".join(map(str, example.shape[1:]))
        raise ConfigurationError(
            f"network {name!r} does not accept images of {size}: {first}"
        ) from None


def check_batches(
    model: nn.Module, example: Tensor, config: Config, images: int, ranks: Ranks
) -> None:
    """Raise an error if a batch norm would get a single number per channel in training.

    Args:
        model: the network.
        example: an image, (1, C, H, W).
        config: the configuration of the run.
        images: number of training images.
        ranks: the processes that train together.

    Raises:
        ConfigurationError: a batch, or the part of a process, has one image, and the network
            reduces it to one pixel.

    Example:
        >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
        >>> check_batches(model, torch.zeros(1, 3, 8, 8), Config(batch_size=4), 8, Ranks())
        >>> try:
        ...     check_batches(model, torch.zeros(1, 3, 8, 8), Config(batch_size=4), 9, Ranks())
        ... except ConfigurationError as error:
        ...     print(error)
        the last of 9 images is a batch of its own, in which batch norm cannot ...
    """
    sizes = {min(config.batch_size, images), images % config.batch_size}
    if config.data.drop_last and images >= config.batch_size:
        sizes = {config.batch_size}
    parts = set()
    for size in sizes:
        own = ranks.part(0, size)
        count, most = own.stop - own.start, config.system.micro_batch or size
        parts |= {min(count, most), count % most if most else 0}
    norms = (nn.modules.batchnorm._BatchNorm,)
    if 1 not in parts or not any(isinstance(module, norms) for module in model.modules()):
        return
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(example)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        if images % config.batch_size == 1:
            problem = f"the last of {images:,} images is a batch of its own"
            remedy = "data.drop_last=true, or another batch_size"
        else:
            problem = "a batch, or a part of it, has one image"
            remedy = "a larger batch_size or system.micro_batch"
        raise ConfigurationError(
            f"{problem}, in which batch norm cannot compute a deviation. Set {remedy}."
        ) from None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    amp: bool = False,
    ranks: Ranks | None = None,
    compiled: nn.Module | None = None,
    loss: Loss = F.cross_entropy,
) -> tuple[float, float]:
    """Return the mean loss and the accuracy, with the model in evaluation mode.

    Both are means over images; of a text, over characters.

    With several labels per image, the accuracy is the mean average precision.

    Args:
        model: the network; its training mode is restored.
        batches: images (B, C, H, W) and labels, integers (B,) or floats (B, classes); or windows
            of a text and the characters that follow, both integers (B, T).
        amp: whether to use bfloat16 autocast.
        ranks: the processes, each with its own batches; the means are over all of their images.
        compiled: the model compiled for one shape; called for all batches of the first one's size.
        loss: the mean loss of logits and labels.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> images, labels = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 1, 1])
        >>> mean, accuracy = evaluate(model, [(images, labels)])
        >>> round(mean, 4), accuracy  # log 2, and class 0 for all images
        (0.6931, 0.25)
    """
    training, size, ranks = model.training, 0, ranks or Ranks()
    model.eval()
    device = next(model.parameters()).device
    several: list[tuple[Tensor, Tensor]] = []  # logits and labels, if images have several labels
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images
    for x, y in batches:
        size = size or len(y)
        network = compiled if compiled is not None and len(y) == size else model
        with autocast(device, amp):
            logits = network(x).float()
        count = len(y) if y.is_floating_point() else y.numel()
        totals[0] += loss(logits, y) * count
        if y.is_floating_point():
            several.append((logits, y))
        else:
            totals[1] += (logits.argmax(-1) == y).sum()
        totals[2] += count
    model.train(training)
    total, correct, images = ranks.sum(totals).tolist()
    if ranks.agree(bool(several))[0]:
        return total / images, _mean_average_precision(several, ranks)
    return total / images, correct / images


def bits(nats: float) -> float:
    """Return a loss in bits, such as the mean loss of a text in bits per character.

    Args:
        nats: the loss with the natural logarithm.

    Example:
        >>> bits(math.log(8))
        3.0
    """
    return nats / math.log(2)


def _mean_average_precision(found: list[tuple[Tensor, Tensor]], ranks: Ranks) -> float:
    """Return the mean average precision over the images of all ranks; a rank may have none."""
    own = [tuple(torch.cat(part).cpu() for part in zip(*found, strict=True))] if found else []
    every = [pair for pairs in ranks.gather(own) for pair in pairs]
    scores, labels = (torch.cat(part) for part in zip(*every, strict=True))
    return mean_average_precision(scores, labels)


@torch.no_grad()
def f1_score(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    amp: bool = False,
    ranks: Ranks | None = None,
) -> float:
    """Return the F1 score of images with several labels, over all classes together (micro).

    Args:
        model: the network; its training mode is restored.
        batches: images (B, C, H, W) and labels (B, classes) of zeros and ones.
        amp: whether to use bfloat16 autocast.
        ranks: the processes, each with its own batches.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = nn.init.ones_(model[1].weight)
        >>> images, labels = torch.ones(2, 1, 2, 2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> round(f1_score(model, [(images, labels)]), 4)  # both labels for both images
        0.8571
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # true positives, all positives
    for x, y in batches:
        with autocast(device, amp):
            positive = model(x).float() > 0
        totals[0] += (positive & (y > 0.5)).sum()
        totals[1] += positive.sum() + (y > 0.5).sum()
    model.train(training)
    true, both = (ranks or Ranks()).sum(totals).tolist()
    return 2 * true / both if both else 1.0
