"""Plain straight-through estimators: the two ends of Feather's family of thresholds."""

from __future__ import annotations

import math
from functools import partial

from .feather import feather

hard_ste = partial(feather, p=math.inf, theta=1.0)
hard_ste.__doc__ = """Return `feather` with a hard threshold and unscaled gradients of pruned weights.

Source: the baseline 'Hard' of Feather (BMVC 2023).
"""

soft_ste = partial(feather, p=1.0, theta=1.0)
soft_ste.__doc__ = """Return `feather` with a soft threshold and unscaled gradients of pruned weights.

Source: the baseline 'Soft' of Feather (BMVC 2023).
"""
