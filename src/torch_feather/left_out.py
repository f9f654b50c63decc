"""Weights that the default choice leaves dense although a user may expect them to be pruned."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .adapters import in_adapter
from .errors import option, some, warn
from .prunable import DEFAULT, Filters, Prunable, find_prunable, is_lazy, unwrap

# Smaller fractions of the trainable parameters are not worth a warning.
LEAST_FRACTION = 0.01
# Globs in a message.
MOST_GLOBS = 12
# Parameters that nobody expects to be pruned, by a part of their own name.
NEVER = re.compile("bias|pos|token")
ADAPTERS = (
    "Adapters (LoRA) start at 0 or train at small values, so one threshold for all weights would "
    "empty them first: see 'Adapters' in docs/finetuning.md."
)


def find_left_out(
    model: nn.Module, chosen: Sequence[Prunable], exclude: Filters = None
) -> list[Prunable]:
    """Return the trainable weights that are neither prunable by default nor excluded.

    These are parameters with two or more dimensions, such as those of recurrent layers,
    embeddings, adapters and layers of other libraries, and one-dimensional ones of attention
    layers. Biases, norms, positions and tokens are not among them.

    Args:
        model: the model.
        chosen: the prunable weights.
        exclude: filters that the user gave.

    Example:
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.LSTM(4, 4), nn.Linear(4, 2))
        >>> [item.name for item in find_left_out(model, find_prunable(model))]
        ['0.weight', '1.weight_ih_l0', '1.weight_hh_l0']
    """
    taken = {id(item.parameter) for item in chosen}
    every = find_prunable(model, _is_weight, exclude, frozen=False)
    return [item for item in every if id(item.parameter) not in taken]


def _is_weight(module: nn.Module, name: str) -> bool:
    """Return whether a parameter is a weight that a user may expect to be pruned."""
    kind, attribute = type(module).__name__, name.rpartition(".")[2]
    parameter = module._parameters.get(attribute)
    if parameter is None or isinstance(parameter, nn.parameter.UninitializedParameter):
        return False
    # Parametrized, weight-normed and masked layers compute their weight from these.
    original = re.sub("_(v|g|orig)$", "", attribute)
    computed = isinstance(module, ParametrizationList) or (
        original != attribute and original in module.__dict__
    )
    if computed or "Norm" in kind or NEVER.search(attribute) or not parameter.is_floating_point():
        return False
    of_attention = parameter.dim() == 1 and "att" in f"{kind}.{attribute}".lower()
    return parameter.dim() >= 2 or of_attention


def warn_of_left_out(model: nn.Module, chosen: Sequence[Prunable], exclude: Filters = None) -> None:
    """Warn of weights that stay dense, if they are 1% of the trainable parameters or more.

    Args:
        model: the model.
        chosen: the weights that are prunable by default.
        exclude: filters that the user gave.

    Example:
        >>> import warnings
        >>> model = nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 2))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn_of_left_out(model, find_prunable(model))
        >>> str(caught[0].message)[:47]
        '0.weight_ih_l0, 0.weight_hh_l0 (75.3% of the tr'
    """
    left = find_left_out(model, chosen, exclude)
    if _fraction(model, left) >= LEAST_FRACTION:
        names = [item.name for item in left]
        others = {name for name, _ in _every_name(model)} - set(names)
        keep = option("exclude", _globs(names, others))
        warn(
            f"{describe_left_out(model, left)} To keep them dense without this warning, pass "
            f"{keep}."
        )


def _every_name(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return unwrap(model).named_parameters(remove_duplicate=False)


def _fraction(model: nn.Module, items: Iterable[Prunable]) -> float:
    trained = [p for p in model.parameters() if p.requires_grad and not is_lazy(p)]
    total = sum(parameter.numel() for parameter in trained)
    return sum(item.parameter.numel() for item in items) / max(total, 1)


def describe_left_out(model: nn.Module, left: Sequence[Prunable]) -> str:
    """Return a text that names weights which stay dense, and the option that includes them.

    Args:
        model: the model.
        left: a result of `find_left_out`, not empty.

    Example:
        >>> model = nn.LSTM(4, 4)
        >>> text = describe_left_out(model, find_left_out(model, []))
        >>> text.partition(")")[0]
        'weight_ih_l0, weight_hh_l0 (80.0% of the trainable parameters'
        >>> text.partition("To prune them too, pass ")[2]
        'include=["default", "weight_*"].'
    """
    largest = sorted(left, key=lambda item: item.parameter.numel(), reverse=True)
    names = [item.name for item in largest]
    others = {name for name, _ in _every_name(model)} - set(names)
    include = [DEFAULT, *_globs(names, others)]
    advice = f"{ADAPTERS} " if any(in_adapter(unwrap(model), name) for name in names) else ""
    return (
        f"{some(names)} ({_fraction(model, left):.1%} of the trainable parameters) stay dense. The "
        "default prunes the weights of PyTorch's convolutions, linear layers and attention "
        f"projections alone. {advice}To prune them too, pass {option('include', include)}."
    )


def _globs(names: Sequence[str], others: Iterable[str]) -> list[str]:
    """Return few globs that match all of these names and none of the others."""
    others, found = list(others), list[str]()
    for name in names:
        if any(fnmatchcase(name, glob) for glob in found):
            continue
        parts = name.split(".")
        tails = ["*." + ".".join(parts[-k:]) for k in range(1, len(parts))]
        numbered = [re.sub(r"\d+", "*", tail) for tail in (*tails, name)]
        numbered += [re.sub("_(ih|hh)_l[*]", "_*", tail) for tail in numbered]  # recurrent layers
        options = [
            glob
            for glob in (*numbered, *tails)
            if fnmatchcase(name, glob) and not any(fnmatchcase(one, glob) for one in others)
        ]
        # The one that covers most names; among these, the most specific.
        covers = {glob: sum(fnmatchcase(one, glob) for one in names) for glob in options}
        best = max(options, key=lambda glob: (covers[glob], len(glob)), default=name)
        if len(found) == MOST_GLOBS:
            return [*found, "..."]
        found.append(best if covers.get(best, 1) > 1 else name)
    return found
