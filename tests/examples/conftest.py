"""A way to interrupt an example, and the sparsifiers that it created."""

import pytest
from example_cases import Killed

import torch_feather as feather


@pytest.fixture
def killed_at(monkeypatch):
    """Make the nth call of a method raise."""

    def kill(owner, name, call, train):
        real, left = getattr(owner, name), [call]

        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counted)
            with pytest.raises(Killed):
                train()

    return kill


@pytest.fixture
def created(monkeypatch, tmp_path):
    """The sparsifiers that `feather.sparsify` returned; the test runs in an empty folder."""
    real, found = feather.sparsify, []

    def sparsify(*args, **kwargs):
        found.append(real(*args, **kwargs))
        return found[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(feather, "sparsify", sparsify)
    return found
