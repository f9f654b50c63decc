"""Values in fixed memory, so that a step can be captured in a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import devices
from ..methods.base import BoundMethod, Pruning
from ..weights.latent import copy_all


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples and lists, and of objects with `tensors()`.

    Args:
        value: tensors, objects with `tensors()`, and anything else, which is left out.

    Example:
        >>> len(tensors_in((torch.zeros(1), [torch.zeros(2), 3])))
        2
    """
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "tensors"):
        return value.tensors()
    if isinstance(value, tuple | list):
        return [tensor for one in value for tensor in tensors_in(one)]
    return []


def outline(value: Any) -> Any:
    """Return the structure of a value: positions of tensors, and which are the same object.

    Args:
        value: as for `tensors_in`. Values other than tensors are part of the result.

    Example:
        >>> a, b = torch.zeros(2), torch.ones(2)
        >>> outline([a, b]) == outline([b, a]), outline([a, b]) == outline([a, a])
        (True, False)
    """
    first: dict[int, int] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return "tensor", first.setdefault(id(value), len(first)), value.shape, value.dtype
        if hasattr(value, "tensors"):
            return type(value), [walk(tensor) for tensor in value.tensors()]
        if isinstance(value, tuple | list):
            return type(value), [walk(one) for one in value]
        return value

    return walk(value)


def keep_memory(old: Pruning, new: Pruning, device: torch.device) -> Pruning:
    """Return `new`; on an accelerator in the memory of `old`, if their structures are equal.

    Args:
        old: pruning of the step before; None for none. Its tensors may be overwritten.
        new: pruning of this step.
        device: device of the weights.

    Example:
        >>> old, new = torch.zeros(2), torch.ones(2)
        >>> keep_memory(old, new, torch.device("cpu")) is new  # on a CPU nothing is captured
        True
    """
    if old is None or not devices.synchronizes(device) or outline(old) != outline(new):
        return new
    copy_all(*packed(tensors_in(old), tensors_in(new)))
    return old


def packed(
    targets: Sequence[Tensor], sources: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return fewer pairs to copy: numbers that fill one piece of memory are copied as one tensor.

    Args:
        targets: tensors to write, in any order and number of times.
        sources: as many tensors, of the same shapes and types.

    Example:
        >>> old, new = torch.zeros(2), torch.ones(2)
        >>> [target.shape for target in packed(old.unbind(), new.unbind())[0]]
        [torch.Size([2])]
    """
    groups: dict[tuple[int, int], dict[tuple[int, int], tuple[Tensor, Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        memory = target.untyped_storage()._cdata, source.untyped_storage()._cdata
        groups.setdefault(memory, {})[_byte(target), _byte(source)] = target, source
    pairs: list[tuple[Tensor, Tensor]] = []
    for group in groups.values():
        whole = _whole(group)
        pairs += list(group.values()) if whole is None else [whole]
    return [target for target, _ in pairs], [source for _, source in pairs]


def _byte(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _whole(
    group: dict[tuple[int, int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor] | None:
    """Return two pieces of memory as tensors, if numbers fill both of them in the same order."""
    if len(group) < 2 or any(a != b for a, b in group):
        return None
    if any(one.numel() != 1 for pair in group.values() for one in pair):
        return None
    length = sum(target.element_size() for target, _ in group.values())
    target, source = max(group.values(), key=lambda pair: pair[0].element_size())
    if any(one.untyped_storage().nbytes() != length for one in (target, source)):
        return None
    shape = (length // target.element_size(),)
    return target.as_strided(shape, (1,), 0), source.as_strided(shape, (1,), 0)


def store(method: BoundMethod, pruning: Pruning) -> Pruning:
    """Copy the fields of a pruning that checkpoints hold into the state of their method.

    Args:
        method: names the fields in `facts.stored`.
        pruning: of the method's own weights, a NamedTuple if there are such fields. A field that is
            None leaves its entry unchanged.

    Returns:
        The pruning, with the memory of the state in place of its own.

    Example:
        >>> from torch import nn
        >>> from torch_feather.context import MethodContext
        >>> from torch_feather.methods import spartan
        >>> from torch_feather.weights.latent import LatentWeights
        >>> weights = LatentWeights([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
        >>> context = MethodContext(nn.Linear(4, 1), ["w"], weights, 0.5, 10)
        >>> method = spartan(sparsity=0.5).bind(context)
        >>> pruning = store(method, method.update(weights, torch.tensor(10)))
        >>> method.state["mask"].flat.count_nonzero(), pruning.mask is method.state["mask"].rows
        (tensor(2), True)
    """
    for name in method.facts.stored:
        value, entry = getattr(pruning, name), method.state[name]
        if isinstance(value, Tensor):
            entry.flat.copy_(value)
        elif value is not None and value is not entry.rows:
            copy_all(entry.rows, value)
            pruning = pruning._replace(**{name: entry.rows})
    return pruning
