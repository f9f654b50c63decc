"""Measuring how long calls take."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

LONG = 2.0  # milliseconds


def milliseconds(
    call: Callable[[], object],
    min_total: float = 10.0,
    max_calls: int = 30,
    give_up: float = math.inf,
) -> float:
    """Return the shortest time of a call, of at least 4 calls; of 2 if they are long.

    Other work on the machine only adds to a time, so the shortest one shows the function's own. It
    adds a smaller part to a long call.

    Args:
        call: function to time.
        min_total: milliseconds that all calls take together at least.
        max_calls: number of calls after which timing ends in any case.
        give_up: if the first call takes longer than this, it is the only one.

    Example:
        >>> milliseconds(lambda: None, min_total=0.0) < 1000
        True
    """
    if (first := _time(call)) > give_up:
        return first
    times, enough = [first], 2 if first > LONG else 4
    while len(times) < enough or (sum(times) < min_total and len(times) < max_calls):
        times.append(_time(call))
    return min(times)


def alternate(
    calls: Sequence[Callable[[], object]],
    rounds: int = 7,
    burst: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the median milliseconds of each of several functions, called alternately.

    Alternating spreads a change of the machine's speed evenly over all functions.

    Args:
        calls: functions to time.
        rounds: turns of each function.
        burst: timed calls in a turn. One call before them is not timed, since it finds the data of
            the other functions in the caches.
        clock: function that returns seconds. With `time.process_time`, time in which other
            processes have the core does not count; functions must then use one thread.

    Example:
        >>> len(alternate([lambda: 1, lambda: 2], rounds=1))
        2
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for own, call in zip(times, calls, strict=True):
            call()
            own += [_time(call, clock) for _ in range(burst)]
    return [statistics.median(own) for own in times]


def _time(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    call()
    return 1e3 * (clock() - start)
