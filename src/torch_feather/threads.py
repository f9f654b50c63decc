"""Work on the cores of a CPU, and memory that is kept from step to step."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

Task = TypeVar("Task")
Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}
_memory = threading.local()

# The threads of a pool do not exist in a forked process, such as a worker of a DataLoader.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def for_each(function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    """Return `function(task)` for each task, computed by as many threads as PyTorch uses.

    Each thread takes neighbouring tasks. The function must release the GIL to gain from threads, as
    NumPy does, and must not call operators that use PyTorch's own threads.

    Args:
        function: called once per task.
        tasks: in the order of the results.

    Example:
        >>> for_each(lambda x: x * x, [1, 2, 3])
        [1, 4, 9]
    """
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        return [function(task) for task in tasks]
    bounds = [len(tasks) * t // threads for t in range(threads + 1)]
    parts = [tasks[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="torch_feather")
    others = [_pools[threads].submit(_run, function, part) for part in parts[1:]]
    done = _run(function, parts[0])
    for other in others:
        done += other.result()
    return done


def _run(function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    return [function(task) for task in tasks]


def scratch(name: str, size: int, dtype: np.dtype | type) -> np.ndarray:
    """Return memory of this thread for temporary values; the next call may return it again.

    Args:
        name: distinguishes arrays that are in use at the same time.
        size: number of elements.
        dtype: type of the elements.

    Example:
        >>> scratch("values", 3, np.float32).shape
        (3,)
    """
    held = _memory.__dict__.setdefault("arrays", {})
    key = (name, np.dtype(dtype))
    if key not in held or held[key].size < size:
        held[key] = np.empty(size, dtype)
    return held[key][:size]
