"""`sparsify`: checks its arguments and attaches sparse training to an optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .engine.wrappers import levels_of
from .errors import ConfigurationError
from .filters import Filters, list_filters
from .left_out import describe_left_out, find_left_out, warn_of_left_out
from .methods import AnyMethod, build_method
from .methods.choice import AUTO, Choice, Situation, choose, network_kind
from .methods.chosen import Chosen
from .prunable import Prunable, find_prunable
from .sparsifier import Sparsifier
from .targets import Sparsity, Target, check_fraction
from .weights.shards import reshard

MOST_STEPS = 10**9  # of a schedule, which holds 8 bytes for each


# long: the docstring is the reference of the main entry point.
def sparsify(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    method: str | AnyMethod = "feather",
    *,
    sparsity: Sparsity,
    total_steps: int,
    include: Filters = None,
    exclude: Filters = None,
    count: str = "prunable",
    **options: Any,
) -> Sparsifier:
    """Attach sparse training to an optimizer. The training loop does not change.

    From now on, outside of `optimizer.step`, the model is the sparse model: everything evaluated,
    saved or copied has exact zeros. `model.state_dict()` and `optimizer.state_dict()` are enough to
    resume exactly.

    Args:
        model: the network; none of its modules or keys change.
        optimizer: the optimizer that trains it, or several that each hold a part, in the order in
            which they step. The schedule advances when the last one has stepped.
        method: a name from `available_methods()`, an import path `package.module:factory`, or an
            object with `bind(context)` such as `methods.Method`. Or 'auto', which chooses a method
            by the rules in `methods.choice`, and says which and why; see `Sparsifier.method`. A
            loaded state continues with the method that wrote it.
        sparsity: final fraction of zeros among the prunable weights, in [0, 1). Or a mapping from
            filters to fractions, one per group: ``{"*.attn.*": 0.9, "*": 0.95}``. The first filter
            that matches a weight counts; each group has exactly its number of zeros.
        total_steps: optimizer steps of the whole training; of several optimizers, those of the last
            one. Later steps keep the final sparsity. But they are an error if another optimizer
            steps less often than the last one, so that its steps were probably counted.
        include, exclude: filters that choose the prunable weights, see `prunable.find_prunable`.
        count: reference of a single `sparsity`: 'prunable' weights, or 'all' parameters of the
            model. With 'all', zeros are still among the prunable weights, and `Sparsifier.target`
            is their fraction of these.
        **options: options of the method, see `methods.method_options(name)`.

    Returns:
        The `Sparsifier`.

    Raises:
        ConfigurationError: an impossible request; the message says why and what to do.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = sparsify(model, optimizer, sparsity=0.9, total_steps=2)
        >>> for _ in range(2):
        ...     model(torch.randn(4, 10)).square().sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> sparsifier.finalize()
        Linear(in_features=10, out_features=10, bias=True)
        >>> int((model.weight == 0).sum())
        90
    """
    if not isinstance(sparsity, Mapping):
        sparsity = check_fraction(sparsity)
    if not isinstance(total_steps, Integral) or isinstance(total_steps, bool) or total_steps < 1:
        raise ConfigurationError(
            "total_steps must be the number of optimizer steps of the whole training (epochs times "
            f"steps per epoch), an integer >= 1; got {total_steps!r}."
        )
    if total_steps > MOST_STEPS:
        raise ConfigurationError(
            f"total_steps must be at most {MOST_STEPS:,}, because the schedule is stored step by "
            f"step; got {total_steps!r:.80}."
        )
    if not isinstance(method, str) and not hasattr(method, "bind"):
        raise ConfigurationError(
            "method must be the name of a method, or an object with bind(context), got "
            f"{type(method).__name__}. Names: feather.available_methods()."
        )
    if options and not isinstance(method, str):
        raise ConfigurationError(
            f"Options ({', '.join(options)}) belong to methods given by name. Set them on the "
            "method object."
        )
    if options and method == AUTO:
        raise ConfigurationError(
            f"method={AUTO!r} chooses the options too, got {', '.join(options)}. Name the method "
            "that they belong to, such as method='feather', or leave them out."
        )
    if isinstance(model, nn.Module):
        reshard(model)
    include, exclude = list_filters(include), list_filters(exclude)
    prunable = find_prunable(model, include, exclude, frozen=False)
    if include is None:
        _check_left_out(model, prunable, exclude)
    target = Target.of(model, prunable, sparsity, count)
    if method == AUTO:
        method, fraction = _choose(prunable, target, optimizer, total_steps), target.sparsity
    else:
        if isinstance(method, str):
            method = build_method(method, sparsity=target.requested, **options)
        method, fraction = target.given_to(method)
    return Sparsifier(model, optimizer, method, fraction, int(total_steps), include, exclude)


def _choose(
    prunable: Sequence[Prunable],
    target: Target,
    optimizer: Optimizer | Sequence[Optimizer],
    total_steps: int,
) -> Chosen:
    """Return the method that the rules choose, and tell the user."""
    optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    names = dict.fromkeys(type(levels_of(one)[-1]).__name__ for one in optimizers)
    situation = Situation(
        target.requested, network_kind(prunable), " and ".join(names), int(total_steps)
    )

    def build(choice: Choice) -> AnyMethod:
        method = build_method(choice.method, sparsity=target.requested, **choice.options)
        return target.given_to(method)[0]

    chosen = Chosen(choose(situation), build)
    chosen.announce()
    return chosen


def _check_left_out(model: nn.Module, prunable: Sequence[Prunable], exclude: Filters) -> None:
    """Warn of weights that the default choice leaves dense; raise if it leaves all of them."""
    if not prunable and (left := find_left_out(model, prunable, exclude)):
        raise ConfigurationError(
            f"{type(model).__name__} has no prunable weights: {describe_left_out(model, left)}"
        )
    warn_of_left_out(model, prunable, exclude)
