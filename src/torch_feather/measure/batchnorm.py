"""Re-estimation of batch-norm statistics after the weights of a model have changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigurationError
from ..prunable import unwrap

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recalibrate_batchnorm(
    model: nn.Module, loader: Iterable[Any], *, batches: int | None = None
) -> None:
    """Replace the running statistics of every BatchNorm by their average over a loader.

    Batch norms run in training mode, all other modules in eval mode, without gradients. All batches
    have the same weight, so drop a smaller last batch. Modes and momenta are restored. On any
    error, Ctrl-C included, the old statistics are restored too, and always those of norms that no
    batch reached.

    Args:
        model: on one device, to which inputs are moved.
        loader: batches. A batch is the input tensor, a tuple or list that starts with it, or a
            dict. The input of a dict is its entry "input", otherwise the first entry.
        batches: maximum number of batches. None: the whole loader.

    Raises:
        ConfigurationError: there is no BatchNorm with running statistics or no batch, an argument
            or a batch has another form, or statistics are NaN or infinite.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> recalibrate_batchnorm(model, [torch.tensor([[1.0], [3.0]])])
        >>> model[0].running_mean
        tensor([2.])
    """
    _check_arguments(loader, batches)
    model = unwrap(model)
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
    }
    if not norms:
        raise ConfigurationError(
            f"{type(model).__name__} has no BatchNorm with running statistics to recalibrate."
        )
    device = next(iter(norms.values())).get_buffer("running_mean").device
    with _measuring(model, norms), torch.no_grad():
        seen = 0
        for batch in islice(loader, None if batches is None else int(batches)):
            model(_input_of(batch).to(device))
            seen += 1
        if seen == 0:
            raise ConfigurationError("loader yielded no batch to estimate statistics from.")
        for name, norm in norms.items():
            if not all(norm.get_buffer(key).isfinite().all() for key in STATISTICS):
                raise ConfigurationError(
                    f"The batches gave NaN or infinite statistics at {name or 'the norm'}; the old "
                    "ones were kept. Check the inputs, and the weights before this layer."
                )


def _check_arguments(loader: Any, batches: Any) -> None:
    """Raise ConfigurationError unless these can be batches, and a number of them."""
    if isinstance(loader, Tensor):
        raise ConfigurationError(
            "loader must yield batches, but is one tensor. Pass [tensor] to use it as one batch."
        )
    if not isinstance(loader, Iterable) or isinstance(loader, str | bytes):
        raise ConfigurationError(
            "loader must yield batches, such as a DataLoader or a list of batches, got "
            f"{type(loader).__name__}."
        )
    if batches is not None and (not isinstance(batches, Integral) or batches < 1):
        raise ConfigurationError(f"batches must be an integer >= 1 or None, got {batches!r:.80}.")


@contextmanager
def _measuring(model: nn.Module, norms: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Average statistics in norms, with all else in eval mode; on an error restore them."""
    modes = [(module, module.training) for module in model.modules()]
    training = model.training
    momenta = [norm.momentum for norm in norms.values()]
    before = [{key: norm.get_buffer(key).clone() for key in STATISTICS} for norm in norms.values()]
    complete = False
    try:
        # Compiled code would be compiled again for these modes.
        with torch.compiler.set_stance("force_eager"):
            model.eval()
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.training = True  # not `train()`, which also reaches submodules of the norm
            yield
        complete = True
    finally:
        for norm, momentum, old in zip(norms.values(), momenta, before, strict=True):
            norm.momentum = momentum
            if not complete or norm.num_batches_tracked == 0:
                for key in STATISTICS:
                    norm.get_buffer(key).copy_(old[key])
        model.train(training)  # first: `train` of some modules does more than set the flag
        for module, mode in modes:
            module.training = mode


def _input_of(batch: Any) -> Tensor:
    """Return the input tensor of a batch."""
    found = batch
    if isinstance(batch, Mapping) and batch:
        found = batch["input"] if "input" in batch else next(iter(batch.values()))
    elif isinstance(batch, tuple | list) and batch:
        found = batch[0]
    if not isinstance(found, Tensor):
        raise ConfigurationError(
            "A batch must be a tensor, a tuple or list that starts with the input tensor, or a "
            f'dict with a tensor under "input". Got {type(batch).__name__} holding '
            f"{type(found).__name__}."
        )
    return found
