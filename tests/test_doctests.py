"""Every example in a docstring of the package runs, and prints what it shows."""

import doctest
import importlib
import pkgutil
import warnings

import pytest

import torch_feather

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = [
    "torch_feather",
    *(found.name for found in pkgutil.walk_packages(torch_feather.__path__, "torch_feather.")),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("torch_feather"):
                raise
            pytest.skip(f"needs {error.name}")
    result = doctest.testmod(module, optionflags=FLAGS)
    assert not result.failed, f"{result.failed} of {result.attempted} examples of {name} failed"
