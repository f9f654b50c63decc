"""Initial weights: what fits is loaded, a head of another size is replaced, the rest is listed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..errors import ConfigurationError, StateError, some
from ..export.fitting import fitted, load
from .config import PRETRAINED
from .errors import printable
from .weights import Weights, read_weights

LEAST = 0.5  # fraction of the weights outside of the head that the source must have

Shaped = Mapping[str, Any]  # tensors, or descriptions with a shape, by name


def initialize(model: nn.Module, source: str | None, network: str) -> list[str]:
    """Load initial weights into a model, except for a head that has another number of classes.

    Files may have other names in front of the model's (`module.`, `model.`). Files of timm's
    earlier versions and of torchvision are converted by timm, if the model is of timm.

    Args:
        model: the network, with new weights.
        source: a run directory or a file; `pretrained` for the published weights of timm; None
            keeps the new weights.
        network: name of the network.

    Returns:
        What was not loaded, one sentence per kind; empty if everything fits.

    Raises:
        ConfigurationError: the weights belong to another network: it lacks more than half of them.
        FeatherError: the source cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.pt"
        >>> torch.save(models.create("resnet8", num_classes=10).state_dict(), path)
        >>> model = models.create("resnet8", num_classes=3)
        >>> initialize(model, str(path), "resnet8")
        ['weights.pt: its head (fc) has 10 outputs, this run 3 classes. The head starts anew.']
    """
    if source is None:
        return []
    if source == PRETRAINED:
        weights = Weights(Path(network), _published(model, network), network)
        title = f"timm's weights of {network.removeprefix(models.TIMM)}"
    else:
        weights = read_weights(source)
        title = printable(Path(source).name)
    try:
        weights.check(model)  # `fill` would load a part of what does not fit
        weights.fill(model)
        return []
    except ConfigurationError as error:
        misfit = error
    state = model.state_dict()
    given = _best_names(model, weights.tensors, state)
    fits = [name for name in state if name in given and given[name].shape == state[name].shape]
    head, outputs = _other_head(model, given, state)
    missing = [
        name
        for name in state
        if name not in (*fits, *head) and not name.endswith("num_batches_tracked")
    ]
    unused = [name for name in given if name not in state]
    body = {name: tensor.numel() for name, tensor in state.items() if name not in head}
    found = sum(body[name] for name in fits if name in body)
    if found < LEAST * sum(body.values()):
        raise ConfigurationError(f"{misfit}. This run trains {network}; --network names another.")
    try:
        load(model, lambda: {**state, **fitted(state, fits, given.__getitem__)}, title)
    except StateError:
        raise misfit from None
    return list(_sentences(title, head, outputs, state, missing, given, unused))


def _published(model: nn.Module, network: str) -> dict[str, Tensor]:
    """Return the state dict of timm's published network, for the channels of `model`."""
    if not network.startswith(models.TIMM):
        raise ConfigurationError(
            f"published weights exist for networks of timm, such as timm/resnet18, not for "
            f"{network!r}. Use --init FILE for weights in a file."
        )
    first: Any = next((p for p in model.parameters() if p.dim() == 4), None)
    options = {} if first is None or first.shape[1] == 3 else {"in_chans": first.shape[1]}
    with torch.random.fork_rng(devices=[]):
        return models.create_pretrained(network, **options).state_dict()


def _best_names(
    model: nn.Module, tensors: Mapping[str, Tensor], state: Shaped
) -> Mapping[str, Tensor]:
    """Return the tensors by the model's names, as far as they can be found."""
    given = _without_prefix(tensors, state)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None and _matches(given, state) < len(state):
        with suppress(Exception):  # made for files of certain origins only
            converted = convert(dict(given), model)
            if _matches(converted, state) > _matches(given, state):
                return converted
    return given


def _without_prefix(tensors: Mapping[str, Tensor], state: Shaped) -> dict[str, Tensor]:
    """Remove the names of the modules around the network, such as `module.model.`."""
    prefixes = {""}
    for name in tensors:
        parts = name.split(".")
        prefixes |= {"".join(f"{part}." for part in parts[:depth]) for depth in (1, 2)}

    def renamed(prefix: str) -> dict[str, Tensor]:
        start = len(prefix)
        inside = {name[start:]: t for name, t in tensors.items() if name.startswith(prefix)}
        outside = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
        return outside | inside

    # In a draw the shortest prefix: the network itself, not its average.
    return max(
        (renamed(prefix) for prefix in sorted(prefixes, key=lambda p: (len(p), p))),
        key=lambda given: _matches(given, state),
    )


def _matches(given: Shaped, state: Shaped) -> int:
    return sum(name in state and state[name].shape == given[name].shape for name in given)


def _other_head(model: nn.Module, given: Shaped, state: Shaped) -> tuple[list[str], int]:
    """Return the entries of the head if the file has another number of classes, and that number."""
    known = getattr(model, "pretrained_cfg", {}).get("classifier")
    if isinstance(known, str):
        known = (known,)
    if not known:
        matrices = [name for name, tensor in state.items() if tensor.dim() >= 2]
        known = tuple(name.rpartition(".")[0] for name in matrices[-1:])
    entries, outputs = [], 0
    for name in state:
        if not name.startswith(tuple(f"{module}." for module in known)):
            continue
        own, other = state[name].shape, given[name].shape if name in given else None
        if other is not None and own[1:] == other[1:] and own[:1] != other[:1]:
            entries.append(name)
            outputs = other[0]
    return entries, outputs


def _sentences(
    title: str,
    head: Sequence[str],
    outputs: int,
    state: Shaped,
    missing: Sequence[str],
    given: Shaped,
    unused: Sequence[str],
) -> Iterator[str]:
    if head:
        modules = some(sorted({name.rpartition(".")[0] for name in head}))
        yield (
            f"{title}: its head ({modules}) has {outputs:,} outputs, this run "
            f"{state[head[0]].shape[0]:,} classes. The head starts anew."
        )
    shapes = [
        f"{name} ({list(given[name].shape)} in the file, {list(state[name].shape)} in the network)"
        for name in missing
        if name in given
    ]
    absent = [name for name in missing if name not in given]
    if shapes:
        yield f"{title}: of another shape and not loaded: {some(shapes, 5)}"
    if absent:
        yield f"{title}: not in the file, so these keep their initial values: {some(absent, 5)}"
    if unused:
        names = [printable(name)[:80] for name in unused]
        yield f"{title}: not in the network and not loaded: {some(names, 5)}"
