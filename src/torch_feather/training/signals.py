"""Ctrl-C and SIGTERM during training: the step is completed, but not for longer than a limit."""

from __future__ import annotations

import _thread
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import Interrupted

GRACE = 5.0  # seconds that an abandoned operation may take before SIGTERM ends the process


class _Requests:
    """Signal handler that remembers a request to stop.

    Args:
        seconds: how long the present step may take after the request.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.requested = self.expired = False
        self.number = signal.SIGINT
        self.stopped = threading.Event()
        self.timer: threading.Timer | None = None

    def __call__(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.number = True, signal.Signals(number)
        if number == signal.SIGTERM:
            # The next one ends the process at once, even within a long operation of PyTorch.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.timer = threading.Timer(self.seconds, self.expire)
        self.timer.daemon = True
        self.timer.start()

    def expire(self) -> None:
        """Interrupt the step. Python does so between two operations of PyTorch."""
        self.expired = True
        _thread.interrupt_main(signal.SIGINT)
        if self.number == signal.SIGTERM and not self.stopped.wait(GRACE):
            os.kill(os.getpid(), signal.SIGTERM)

    def at_end_of_step(self) -> bool:
        """Return whether a stop is requested; if so, the step has ended in time."""
        if self.requested and self.timer is not None:
            self.timer.cancel()
        return self.requested


@contextmanager
def stop_requests(seconds: float, hint: str) -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a request that the loop checks after each step.

    An exception within a step would leave a state that an uninterrupted run never has, so no
    checkpoint can be written there. A step that takes longer than `seconds` after the request is
    interrupted nevertheless: between two operations of PyTorch or, after SIGTERM, at the latest
    `GRACE` seconds later. A second signal interrupts at once: SIGTERM ends the process, Ctrl-C
    raises KeyboardInterrupt. The checkpoints on disk stay complete in all cases.

    Args:
        seconds: how long the present step may take after the request.
        hint: how to resume the run, for the message.

    Yields:
        A function that returns whether a stop is requested. Call it at the end of each step.

    Raises:
        Interrupted: the step was interrupted.

    Example:
        >>> with stop_requests(20, "resume with --resume") as stop_requested:
        ...     stop_requested()
        False
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread receives signals
        return
    requests = _Requests(seconds)
    previous = {s: signal.signal(s, requests) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests.at_end_of_step
    except KeyboardInterrupt:
        if not requests.expired:
            raise
        raise Interrupted(
            f"stopped without a new checkpoint, because the step had not ended after {seconds:g} s "
            f"(system.stop_seconds); {hint}"
        ) from None
    finally:
        requests.stopped.set()
        if requests.timer is not None:
            requests.timer.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)
