"""Import examples as modules."""

import importlib.util
import os
import sys
from pathlib import Path
from unittest import mock

import torch

# No test may access the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

EXAMPLES = Path(__file__).parents[2] / "examples"


class Killed(Exception):  # noqa: N818
    """Interrupts a training run."""


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def spy_on(owner, name):
    """Count the calls of a method."""
    return mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name))


def zeros_of(sparsifier, model=None):
    """Count the zeros in the weights of a sparsifier, in its model or another one."""
    model = sparsifier.model if model is None else model
    return sum(int((model.get_parameter(name) == 0).sum()) for name in sparsifier.masks())


def expected_zeros(sparsifier):
    """Return round(s N)."""
    return round(sparsifier.target * sum(mask.numel() for mask in sparsifier.masks().values()))


def assert_same(one, other):
    """Compare two models bit by bit."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    for (name, a), (other_name, b) in pairs:
        assert name == other_name
        assert torch.equal(a, b), name
