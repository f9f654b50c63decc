"""A way to interrupt an example."""

import pytest
from example_cases import Killed


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
