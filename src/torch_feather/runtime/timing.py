"""How long something takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence


def milliseconds(
    call: Callable[[], object], enough: float = 10.0, most: int = 30, hopeless: float = math.inf
) -> float:
    """Median time of a call: of as many as take `enough` milliseconds, of at least 3.

    A first call that takes more than `hopeless` milliseconds is the only one.
    """
    if (first := _once(call)) > hopeless:
        return first
    times: list[float] = []
    while len(times) < 3 or (sum(times) < enough and len(times) < most):
        times.append(_once(call))
    return statistics.median(times)


def alternate(
    calls: Sequence[Callable[[], object]], rounds: int = 7, burst: int = 3
) -> list[float]:
    """Median milliseconds of each of several calls that take turns.

    Args:
        calls: what to time.
        rounds: turns of each.
        burst: calls in a turn that count; one before finds what the others left in the caches.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for mine, call in zip(times, calls, strict=True):
            call()
            mine += [_once(call) for _ in range(burst)]
    return [statistics.median(mine) for mine in times]


def _once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
