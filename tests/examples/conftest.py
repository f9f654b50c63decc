"""A way to stop what an example does in the middle."""

import pytest
from example_cases import Killed


@pytest.fixture
def killed_at(monkeypatch):
    """Within it, the nth call of a method raises."""

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
