"""Bounds on memory and time of one input, within a process that runs many of them."""

from __future__ import annotations

import ctypes
import gc
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

MIB = 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class ExceededError(BaseException):
    """An input needed more memory or time than allowed. No handler of the package may catch it."""


class Limits:
    """Bounds of one input; Linux only for memory.

    Args:
        seconds: of processor time in Python code. An input that does not return to Python ends the
            process after a minute of wall time for each.
        memory: peak of resident memory, in MiB above the level before the input.
        reserved: address space that may be requested in addition, in MiB; a larger request fails.
    """

    def __init__(self, seconds: float = 2.0, memory: int = 128, reserved: int = 1024) -> None:
        self.seconds, self.memory = seconds, memory
        self.measures_memory = CLEAR.exists()
        if self.measures_memory:
            most = int(_status("VmSize") + reserved) * MIB
            resource.setrlimit(
                resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1])
            )
        # Larger than any file of an input: a file that is written without end is an error.
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * MIB, 64 * MIB))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGVTALRM, self._too_slow)
        self.slowest, self.largest = 0.0, 0.0  # seconds and MiB of one input

    def _too_slow(self, number: int, frame: FrameType | None) -> None:
        raise ExceededError(f"took more than {self.seconds:g} s of processor time")

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Raise `ExceededError` if the block needs more than allowed."""
        before = self._reset_peak()
        signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds)
        # Without a handler, this signal ends the process, also in code that is not Python.
        signal.setitimer(signal.ITIMER_REAL, 60 * self.seconds)
        start = time.process_time()
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.slowest = max(self.slowest, time.process_time() - start)
        if self.measures_memory:
            used = _status("VmHWM") - before
            if used > self.memory:
                raise ExceededError(f"needed {used:.0f} MiB of memory")
            self.largest = max(self.largest, used)

    def _reset_peak(self) -> float:
        if not self.measures_memory:
            return 0.0
        CLEAR.write_text("5")  # resets VmHWM
        return _status("VmRSS")


def _status(field: str) -> float:
    """Return a line of /proc/self/status in MiB."""
    with open(STATUS, "rb") as file:
        text = file.read()
    at = text.index(field.encode()) + len(field) + 1
    return int(text[at : text.index(b"kB", at)]) / 1024


def release_memory() -> None:
    """Give memory that is not used back to the system, so that inputs do not add up."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
