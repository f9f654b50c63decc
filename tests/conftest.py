"""What every test of the suite shares: one thread, a fixed seed, reproducible examples."""

import pytest
import torch
from hypothesis import HealthCheck, settings

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
    """Tiny networks gain nothing from threads, and lose much where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
