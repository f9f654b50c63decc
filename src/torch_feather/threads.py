"""Work on the cores of a CPU, and memory that is kept from step to step."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

Task = TypeVar("Task")
Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}
_memory: dict[tuple[int, str, np.dtype | type], np.ndarray] = {}

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
    parts = [tasks[a:b] for a, b in pairwise(bounds)]

    def run(t: int) -> list[Result]:
        return [function(task) for task in parts[t]]

    team = _team()
    done = _in_pool(run, threads) if team is None else _in_team(team, run, threads)
    return [result for part in done for result in part]


def _in_pool(run: Callable[[int], Any], threads: int) -> list[Any]:
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="torch_feather")
    others = [_pools[threads].submit(run, t) for t in range(1, threads)]
    return [run(0), *(other.result() for other in others)]


def _in_team(team: Any, run: Callable[[int], Any], threads: int) -> list[Any]:
    """Run on PyTorch's own OpenMP threads.

    These poll for work for a while after each operator, so other threads would compete with them
    for the cores.
    """
    parallel, number_of, size_of = team
    done: list[Any] = [None] * threads
    failed: list[BaseException] = []

    def member(_: Any) -> None:
        try:
            for t in range(number_of(), threads, size_of()):  # the team may be smaller
                done[t] = run(t)
        except BaseException as error:  # it must not pass through OpenMP
            failed.append(error)

    parallel(_MEMBER(member), None, threads, 0)
    if failed:
        raise failed[0]
    return done


_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _team() -> tuple[Any, Any, Any] | None:
    """Return OpenMP functions of the library that PyTorch calls; None if it has none."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel = library.GOMP_parallel
        number_of, size_of = library.omp_get_thread_num, library.omp_get_num_threads
    except (OSError, AttributeError):  # another system, or a build without OpenMP
        return None
    parallel.argtypes = (_MEMBER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel, number_of, size_of


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
    key = threading.get_ident(), name, dtype
    held = _memory.get(key)
    if held is None or held.size < size:
        held = _memory[key] = np.empty(size, dtype)
    return held[:size]
