"""What a captured CUDA graph would do, without a GPU.

A graph replays kernels on the memory they had when they were captured; no Python runs. So nothing
that a step reads may be memory that the step before it allocated, and nothing may depend on what
the host decided in that one step.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")


def tensors(*values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Memory(TorchDispatchMode):
    """Which memory a step found, and which it allocated."""

    def __init__(self):
        super().__init__()
        self.found: dict[int, str] = {}
        self.allocated: set[int] = set()
        self._held: list[Tensor] = []  # so that no address comes twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tensors(args, kwargs or {})
        for tensor in given:
            if storage(tensor) not in self.allocated:
                self.found.setdefault(storage(tensor), f"{func} of {tuple(tensor.shape)}")
        result = func(*args, **(kwargs or {}))
        made = tensors(result)
        self.allocated |= {storage(t) for t in made} - self.found.keys()
        self._held += given + made
        return result


def reads_across(step: Callable[[], None]) -> list[str]:
    """What the second of two steps does with memory that the first one allocated."""
    with Memory() as first:
        step()
    with Memory() as second:
        step()
    return [what for where, what in second.found.items() if where in first.allocated]


class Tape(TorchDispatchMode):
    """Records the operations of one step, and replays them on the same memory.

    What is made for the moment keeps a place of its own, unlike in a graph, whose memory is shared.
    """

    def __init__(self):
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not any(name in str(func) for name in HOST_READS), f"the host reads: {func}"
        given = {storage(t) for t in tensors(args, kwargs)}
        result = func(*args, **kwargs)
        fresh = [storage(t) not in given for t in tensors(result)]
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        if writes or any(fresh):  # the rest are views, which stay where they are
            self.operations.append((func, args, kwargs, tensors(result), fresh))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results, fresh in self.operations:
            again = tensors(func(*args, **kwargs))
            for place, value, new in zip(results, again, fresh, strict=True):
                if new:
                    assert place.shape == value.shape, f"{func}: the shape depends on the values"
                    place.copy_(value)
