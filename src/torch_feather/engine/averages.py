"""Averages of effective weights, which other libraries keep and deliver: they are dense."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import warn

# Classes that average a model: module, name, and the attribute that holds the average.
AVERAGES = (
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    ("timm.utils.model_ema", "ModelEma", "ema"),
    ("timm.utils.model_ema", "ModelEmaV2", "module"),
    ("timm.utils.model_ema", "ModelEmaV3", "module"),
    ("diffusers.training_utils", "EMAModel", "shadow_params"),
    ("ultralytics.utils.torch_utils", "ModelEMA", "ema"),
    ("torch_ema.ema", "ExponentialMovingAverage", "shadow_params"),
    ("ema_pytorch.ema_pytorch", "EMA", "ema_model"),
    ("lightning.pytorch.callbacks.stochastic_weight_avg", "StochasticWeightAveraging",
     "_average_model"),
    ("pytorch_lightning.callbacks.stochastic_weight_avg", "StochasticWeightAveraging",
     "_average_model"),
)  # fmt: skip

# Reference counts of classes of which a search found no object. Each object of a class counts.
_unused: dict[type, int] = {}


def find_averages(weights: Sequence[Tensor]) -> list[str]:
    """Return the names of the classes of which an object averages a model with these weights.

    Neither PyTorch nor these libraries report that a model is averaged. So all objects of the
    process are searched, if there may be new ones of these classes. Subclasses are left out: they
    may average latent weights.

    Args:
        weights: the prunable weights.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> model = nn.Linear(3, 2)
        >>> average = AveragedModel(model)
        >>> find_averages([model.weight])
        ['AveragedModel']
        >>> find_averages([nn.Linear(7, 7).weight])
        []
    """
    kinds: dict[type, str] = {}
    for module, name, attribute in AVERAGES:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type):
            kinds[kind] = attribute
    for kind in kinds:
        if _unused.setdefault(kind, 0) != sys.getrefcount(kind):
            break
    else:
        return []
    wanted = Counter(weight.shape for weight in weights)
    # `type` and not isinstance, which would run code of proxies.
    objects = [one for one in gc.get_objects() if type(one) in kinds]
    for kind in kinds:
        count = sys.getrefcount(kind)  # before the next line takes references
        _unused[kind] = 0 if any(type(one) is kind for one in objects) else count
    found = [
        type(one).__name__
        for one in objects
        if wanted <= Counter(p.shape for p in _tensors(getattr(one, kinds[type(one)], None)))
    ]
    return list(dict.fromkeys(found))


def _tensors(average: Any) -> Iterable[Tensor]:
    """Return the tensors of an average, which is a module or a list of tensors."""
    if isinstance(average, nn.Module):
        return average.parameters()
    return [one for one in average or () if isinstance(one, Tensor)]


def warn_of_averages(weights: Sequence[Tensor]) -> bool:
    """Warn if another library averages the model; return whether it does.

    Args:
        weights: the prunable weights.

    Example:
        >>> warn_of_averages([nn.Linear(7, 7).weight])
        False
    """
    found = find_averages(weights)
    if found:
        warn(
            f"{' and '.join(found)} averages effective weights. Their masks change during "
            "training, so the average is dense. Use torch_feather.LatentAverage, whose average has "
            "exact zeros: see 'Averaged weights' in docs/frameworks.md."
        )
    return bool(found)
