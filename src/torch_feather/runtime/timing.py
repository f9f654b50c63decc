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
    calls: Sequence[Callable[[], object]], rounds: int = 15, seconds: float = 0.0
) -> list[float]:
    """Median milliseconds of each of several calls that take turns.

    Args:
        calls: what to time.
        rounds: each is called at least so often.
        seconds: and for so long in all.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    start = time.perf_counter()
    while len(times[0]) < rounds or time.perf_counter() - start < seconds:
        for mine, call in zip(times, calls, strict=True):
            mine.append(_once(call))
    return [statistics.median(mine) for mine in times]


def _once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
