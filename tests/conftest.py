"""Settings of all tests: one thread, a fixed seed, reproducible examples; and a browser."""

import shutil
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings
from quick import pytest_collection_modifyitems, pytest_ignore_collect  # noqa: F401
from torch._subclasses.fake_tensor import unset_fake_temporarily

from torch_feather import launching
from torch_feather.engine import health
from torch_feather.engine.health import Health
from torch_feather.methods import magnitude
from torch_feather.schedules import make_table

# The first backward pass of a process starts autograd's threads, one per device. A module of tests
# that uses FakeTensorMode while it is collected adds a device, and tests could not fork any more.
torch.ones(1, requires_grad=True).sum().backward()

# Programs in the background of a shell ignore Ctrl-C, as do the processes that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Examples are derived from the test itself, so that a run can be repeated; no deadline, because
# the machine that runs the suite may be busy.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny networks gain nothing from threads, and lose much if cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def threads_put_back(one_thread):
    """A test may call a program that sets the number of threads; the next test has one again."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def without_gpu(monkeypatch):
    """For tensors without data that stand in for CUDA tensors."""
    monkeypatch.setattr(launching, "uses_triton", lambda device: False)
    # Values that `sparsify` reads once.
    monkeypatch.setattr(Health, "raise_if_nan", lambda *_: None)
    monkeypatch.setattr(Health, "inspect", lambda *_: None)
    monkeypatch.setattr(health, "_is_broken", lambda _: False)
    monkeypatch.setattr(magnitude, "make_table", outside_of_fake_tensors(make_table))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def outside_of_fake_tensors(function):
    """Compute once, on the host."""

    def call(*args):
        with unset_fake_temporarily():
            return function(*args)

    return call


@pytest.fixture(scope="module")
def browser():
    """Chromium, of the system or of playwright."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        yield found
        found.close()
