"""A request to stop: the present step ends, or is abandoned after a limit; nothing is lost."""

import signal
import subprocess
import sys
import time

import pytest

from torch_feather.training.errors import Interrupted
from torch_feather.training.signals import stop_requests

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_step_that_ends_in_time_is_completed(number):
    before = [signal.getsignal(s) for s in SIGNALS]
    with stop_requests(0.2, "resume") as requested:
        assert not requested()
        signal.raise_signal(number)
        assert requested()
        time.sleep(0.4)  # writing the checkpoint is not interrupted
        assert requested()
    assert [signal.getsignal(s) for s in SIGNALS] == before


def _step_after(*numbers, limit):
    """A step that takes 30 seconds."""
    end = time.monotonic() + 30
    with stop_requests(limit, "resume"):
        for number in numbers:
            signal.raise_signal(number)
        while time.monotonic() < end:
            time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_longer_step_is_abandoned_after_the_limit(number):
    began = time.monotonic()
    message = r"without a new checkpoint.*0\.2 s \(system\.stop_seconds\); resume"
    with pytest.raises(Interrupted, match=message):
        _step_after(number, limit=0.2)
    assert 0.2 <= time.monotonic() - began < 10


def test_a_second_ctrl_c_interrupts_the_step():
    with pytest.raises(KeyboardInterrupt):
        _step_after(signal.SIGINT, signal.SIGINT, limit=60)


# A long call into C that releases the interpreter, as PyTorch's operations do. Python's own signal
# handlers run only after it.
WITHIN_AN_OPERATION = """
import ctypes, os, signal, sys, threading
from torch_feather.training import signals
signals.GRACE = 0.5
with signals.stop_requests(float(sys.argv[1]), "resume"):
    signal.raise_signal(signal.SIGTERM)
    if len(sys.argv) > 2:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    print("in the operation", flush=True)
    ctypes.CDLL(None).usleep(60_000_000)
"""


@pytest.mark.parametrize("second", [False, True])
def test_sigterm_ends_the_process_within_an_operation_of_any_length(second):
    """By the limit, or at once by a second signal."""
    command = [sys.executable, "-c", WITHIN_AN_OPERATION, "600" if second else "0.3"]
    process = subprocess.Popen(command + ["second"] * second, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"in the operation\n"
        began = time.monotonic()
        code = process.wait(50)
    finally:
        process.kill()
        process.stdout.close()
    assert code == -signal.SIGTERM
    assert time.monotonic() - began < 40
