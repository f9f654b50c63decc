"""Import examples as modules."""

import importlib.util
import os
import sys
from pathlib import Path
from unittest import mock

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
