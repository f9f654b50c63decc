"""Global random numbers that are seeded for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random numbers of Python, NumPy and PyTorch, and restore them.

    Args:
        seed: the seed.

    Example:
        >>> with seeded(3):
        ...     first = torch.rand(()).item()
        >>> with seeded(3):
        ...     torch.rand(()).item() == first
        True
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
