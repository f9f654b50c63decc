"""A simulation of a captured CUDA graph, without a GPU.

A graph replays kernels on the memory that they had when they were captured; no Python runs. So a
step must not read memory that the step before it allocated, and must not depend on a decision that
the host made in that one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import devices, launching

HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")


@contextmanager
def simulated_device() -> Iterator[None]:
    """Within it, CPU tensors take the path of an accelerator's.

    Example:
        >>> with simulated_device():
        ...     devices.synchronizes(torch.device("cpu"))
        True
    """
    with (
        mock.patch.object(devices, "synchronizes", return_value=True),
        mock.patch.object(launching, "uses_triton", return_value=False),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
    ):
        yield


def tensors(*values: object) -> list[Tensor]:
    """Return the tensors in nested values.

    Args:
        values: tensors, and tuples, lists and dicts of them at any depth, with other values.

    Example:
        >>> tensors({"a": torch.ones(1)}, [torch.zeros(2), 3])
        [tensor([1.]), tensor([0., 0.])]
    """
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    """Return an identifier of a tensor's memory.

    Args:
        tensor: any view of the memory gives the same identifier.

    Example:
        >>> a = torch.zeros(4)
        >>> storage(a[1:]) == storage(a), storage(a.clone()) == storage(a)
        (True, False)
    """
    return tensor.untyped_storage()._cdata


class Memory(TorchDispatchMode):
    """Records which memory a step found, and which it allocated.

    Example:
        >>> x = torch.zeros(2)
        >>> with Memory() as memory:
        ...     y = x + 1
        >>> storage(x) in memory.found, storage(y) in memory.allocated
        (True, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, str] = {}
        self.allocated: set[int] = set()
        self._held: list[Tensor] = []  # no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
    """Return the operations of a second step that read memory allocated by the first one.

    Args:
        step: takes one step; called twice.

    Returns:
        One text per operation. It is empty if the step can be captured in a CUDA graph.

    Example:
        >>> state = {"x": torch.zeros(2)}
        >>> def in_place():
        ...     state["x"].add_(1)
        >>> def replaces():
        ...     state["x"] = state["x"] + 1
        >>> reads_across(in_place), reads_across(replaces)
        ([], ['aten.add.Tensor of (2,)'])
    """
    with Memory() as first:
        step()
    with Memory() as second:
        step()
    return [what for where, what in second.found.items() if where in first.allocated]


class Tape(TorchDispatchMode):
    """Records the operations of one step, and replays them on the same memory.

    Temporary results keep memory of their own, unlike in a graph, whose memory is shared.

    Raises:
        AssertionError: the host reads a value, or a shape depends on values.

    Example:
        >>> x = torch.zeros(2)
        >>> with Tape() as tape:
        ...     _ = x.add_(1)
        >>> tape.replay()
        >>> x
        tensor([2., 2.])
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
        """Repeat the recorded operations on the memory that they had."""
        for func, args, kwargs, results, fresh in self.operations:
            again = tensors(func(*args, **kwargs))
            for old, value, new in zip(results, again, fresh, strict=True):
                if new:
                    assert old.shape == value.shape, f"{func}: the shape depends on the values"
                    old.copy_(value)
