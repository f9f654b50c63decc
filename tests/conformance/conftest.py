"""Settings of the conformance suite alone."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from torch_feather import thresholded
from torch_feather.schedules import make_table
from torch_feather.selection import device
from torch_feather.sparsifier import Sparsifier

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Networks of a hundred weights lose whole layers at high sparsity: that is no failure."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:Every weight of"))


@pytest.fixture
def without_gpu(monkeypatch):
    """For tensors without data that stand in for CUDA tensors."""
    monkeypatch.setattr(device, "_default_passes", lambda scores: device.TorchPasses)
    # What is read once, when the sparsifier is attached.
    monkeypatch.setattr(Sparsifier, "_raise_if_nan", lambda self: None)
    monkeypatch.setattr(Sparsifier, "_inspect", lambda self: None)
    monkeypatch.setattr(thresholded, "make_table", outside_of_fake_tensors(make_table))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def outside_of_fake_tensors(function):
    """What is computed once, on the host."""

    def call(*args):
        with unset_fake_temporarily():
            return function(*args)

    return call
