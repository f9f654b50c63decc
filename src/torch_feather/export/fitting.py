"""Loading of named tensors into a model: whether they fit, and their values in its types."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..errors import FileFormatError, StateError, printable
from .conversion import convert, without_negative_zeros


class Described(Protocol):
    """A tensor, or its description in a file.

    Example:
        >>> given: Described = torch.ones(2, 3)
        >>> tuple(given.shape), given.dtype
        ((2, 3), torch.float32)
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the values."""


def differences(state: Mapping[str, Any], given: Mapping[str, Described]) -> list[str]:
    """Return why named tensors cannot be loaded, in the terms of `load_state_dict`.

    Args:
        state: state dict of the model, with plain names.
        given: the tensors, or their descriptions.

    Example:
        >>> differences({"w": torch.ones(2)}, {"w": torch.ones(3), "b": torch.ones(1)})
        ['unexpected key(s) in the file: b', 'w has shape [3] in the file, [2] in the model']
    """

    def names(kind: str, found: set[str]) -> list[str]:
        shown = sorted(found)[:5] + (["..."] if len(found) > 5 else [])
        return [f"{kind} {', '.join(f'{name:.80}' for name in shown)}"] if found else []

    problems = names("missing key(s) in the file:", state.keys() - given.keys())
    problems += names("unexpected key(s) in the file:", given.keys() - state.keys())
    for name in sorted(state.keys() & given.keys()):
        if problem := _difference(state[name], given[name]):
            problems.append(f"{name} {problem}")
    return problems if len(problems) <= 6 else [*problems[:6], "..."]


def _difference(own: Any, given: Described) -> str | None:
    """Return why a tensor cannot be loaded into that of a model; None if it can."""
    if isinstance(own, UninitializedParameter | UninitializedBuffer):
        return "is of a lazy layer; call the model once with an input first"
    if not isinstance(own, Tensor) or own.is_meta:
        return "has no values in the model"
    if hasattr(own, "full_tensor"):
        return "is sharded in the model; load the file before sharding"
    if own.layout != torch.strided:
        return f"has layout {own.layout} in the model; only dense tensors can be loaded"
    if own.shape != given.shape:
        return f"has shape {list(given.shape)} in the file, {list(own.shape)} in the model"
    if own.dtype != given.dtype and not (own.is_floating_point() and given.dtype.is_floating_point):
        return f"is {given.dtype} in the file, {own.dtype} in the model"
    return None


def fitted(
    state: Mapping[str, Any], names: Iterable[str], read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Return values in the types of a model, without a change of the model.

    Args:
        state: state dict of the model.
        names: names of the values to return.
        read: returns the values of a name, in the shape that the model has.

    Raises:
        StateError: a type of the model cannot hold a value; or tensors that share memory in the
            model have different values.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False).half()
        >>> fitted(layer.state_dict(), ["weight"], {"weight": torch.tensor([[0.1]])}.__getitem__)
        {'weight': tensor([[0.1000]], dtype=torch.float16)}
    """
    values = {}
    for name in names:
        try:
            values[name] = convert(read(name).detach(), state[name].dtype)
        except OverflowError as error:
            raise StateError(
                f"{name:.80} has {error}, the type in the model. Load into a wider type, such as "
                "model.float()"
            ) from None
    if problems := list(_conflicts(state, values)):
        raise StateError(
            f"{'; '.join(problems[:6])}. Untie them in the model, or load a file of a tied model"
        )
    return values


def _conflicts(state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[str]:
    """Return which tensors share memory in the model although their values differ."""
    stored = defaultdict(list)
    for name, value in values.items():
        own = state[name]
        # Wrapper subclasses have no memory of their own.
        if value.numel() and type(own) in (Tensor, nn.Parameter, nn.Buffer):
            stored[own.device, own.untyped_storage().data_ptr()].append(name)
    for names in stored.values():
        spans = {name: _span(state[name]) for name in names}
        end = 0
        clusters: list[list[str]] = []
        for name in sorted(names, key=lambda n: spans[n]):
            begin, stop = spans[name]
            if begin >= end:
                clusters.append([])
            clusters[-1].append(name)
            end = max(end, stop)
        for cluster in clusters:
            wide = any(not _is_dense(state[name]) for name in cluster)
            if (len(cluster) > 1 or wide) and not _agree(cluster, state, values):
                shared = " and ".join(f"{n:.80}" for n in cluster[:3])
                yield f"{shared} share memory in the model, but have different values in the file"


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor's memory and the byte after the last, in its storage."""
    last = sum(int(n - 1) * int(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset()) * tensor.itemsize
    return begin, begin + (last + 1) * tensor.itemsize


def _is_dense(tensor: Tensor) -> bool:
    """Return whether each value of a tensor has its own memory, without gaps."""
    begin, end = _span(tensor)
    used = sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    expected = 1
    for stride, length in used:
        if stride != expected:
            return False
        expected *= length
    return end - begin == tensor.nbytes


def _agree(names: list[str], state: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> bool:
    """Return whether tensors that share memory have their values after all were written."""
    storage = state[names[0]].untyped_storage().clone()
    views = {}
    for name in names:
        own = state[name]
        view = torch.empty(0, dtype=own.dtype, device=own.device)
        views[name] = view.set_(storage, own.storage_offset(), own.shape, own.stride())
    try:
        for name, view in views.items():
            view.copy_(values[name])
    except RuntimeError:  # one memory location holds several values of a tensor
        return False
    return all(_same_values(view, values[name].to(view)) for name, view in views.items())


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors have the same bits, except for signs of zeros."""
    a, b = (without_negative_zeros(x.contiguous()).reshape(-1) for x in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def load(model: nn.Module, values: Callable[[], Mapping[str, Tensor]], source: object) -> None:
    """Load a state dict into a model; any error becomes StateError.

    Args:
        model: the module.
        values: returns the state dict. If it raises StateError, the model is not changed.
        source: where the values are from, for the message.

    Raises:
        StateError: the model does not accept the values.

    Example:
        >>> load(nn.Linear(1, 1), dict, "weights.pt")
        Traceback (most recent call last):
        torch_feather.errors.StateError: weights.pt does not fit Linear: Missing key(s) in ...
    """
    try:
        model.load_state_dict(values())
    except FileFormatError:
        raise
    except StateError as error:
        reason = str(error)
    except Exception as error:  # modules may override how they load
        lines = [line.strip() for line in str(error).splitlines()]
        reason = "; ".join(lines[1:4] or lines or [type(error).__name__])
    else:
        return
    raise StateError(
        f"{printable(source)} does not fit {type(model).__name__}: {printable(reason.rstrip('.'))}."
    )
