"""Plain straight-through estimators: the two ends of Feather's family of thresholds."""

from __future__ import annotations

import math
from functools import partial

from .feather import feather

hard_ste = partial(feather, p=math.inf, theta=1.0)
hard_ste.__doc__ = """Return `feather` with a hard threshold and a plain straight-through gradient.

Source: the baseline 'Hard' of Feather (BMVC 2023).

Example:
    >>> hard_ste(sparsity=0.98).operator
    Hard()
"""

soft_ste = partial(feather, p=1.0, theta=1.0)
soft_ste.__doc__ = """Return `feather` with a soft threshold and a plain straight-through gradient.

Source: the baseline 'Soft' of Feather (BMVC 2023).

Example:
    >>> soft_ste(sparsity=0.98).operator
    Power(p=1.0)
"""
