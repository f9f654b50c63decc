"""Attaching a sparsifier to a run, as any user of the library does."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

import torch_feather as feather

from ..allocation import FlopsBiased
from ..errors import ConfigurationError
from ..methods import method_options
from ..runtime import layer_milliseconds
from .config import DENSE, Config
from .distributed import Ranks

FLOPS = "flops^"  # prefix of an allocation that needs an example input


def attach_sparsifier(
    config: Config,
    model: nn.Module,
    optimizer: Optimizer,
    total_steps: int,
    example: Tensor,
    ranks: Ranks,
) -> feather.Sparsifier | None:
    """Call `sparsify` as the configuration says.

    Args:
        config: the configuration of the run.
        model: the network.
        optimizer: its optimizer.
        total_steps: optimizer steps of the whole run.
        example: an image, (1, C, H, W), for methods that count multiply-adds.
        ranks: the processes that train together.

    Returns:
        The sparsifier; None for dense training.

    Raises:
        ConfigurationError: an unknown method or option, or a value that is not supported.

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> config = Config(method="gmp", sparsity=0.5)
        >>> example = torch.zeros(1, 4)
        >>> sparsifier = attach_sparsifier(config, model, optimizer, 10, example, Ranks())
        >>> model(example).sum().backward()
        >>> optimizer.step()
        >>> sparsifier.step_count
        1
    """
    if config.method == DENSE:
        return None
    options = dict(config.options)
    if str(options.get("allocation")).startswith(FLOPS):
        options["allocation"] = _flops_biased(options["allocation"], example)
    if "example_input" in method_options(config.method):
        options |= _costs(config, model, example, ranks)
    return feather.sparsify(
        model,
        optimizer,
        config.method,
        sparsity=config.sparsity,
        total_steps=total_steps,
        include=config.include,
        exclude=config.exclude,
        **options,
    )


def _flops_biased(allocation: str, example: Tensor) -> FlopsBiased:
    """Return the allocation `flops^0.5`: ranks |w| / c^0.5, with c multiply-adds per weight."""
    try:
        gamma = float(allocation.removeprefix(FLOPS))
    except ValueError:
        raise ConfigurationError(
            f"options.allocation: {allocation!r} must be {FLOPS!r} followed by a number, the bias, "
            f"such as {FLOPS}1."
        ) from None
    return FlopsBiased(gamma, example_input=example)


def _costs(config: Config, model: nn.Module, example: Tensor, ranks: Ranks) -> dict[str, Any]:
    """Return the options of a method that weighs costs; `milliseconds` are measured on this CPU."""
    costs = config.options.get("costs")
    if costs == "milliseconds":
        measure = partial(layer_milliseconds, model, example, config.sparsity)
        return {"costs": ranks.on_first(measure)}
    return {"example_input": example} if costs is None else {}
