"""Plain straight-through estimators: the two ends of Feather's family of thresholds."""

from __future__ import annotations

import math
from functools import partial

from .feather import feather

hard_ste = partial(feather, p=math.inf, theta=1.0)
hard_ste.__doc__ = """`feather` with a hard threshold; pruned weights get their gradient unscaled.

Source: the baseline 'Hard' of Feather (BMVC 2023).
"""

soft_ste = partial(feather, p=1.0, theta=1.0)
soft_ste.__doc__ = """`feather` with a soft threshold; pruned weights get their gradient unscaled.

Source: the baseline 'Soft' of Feather (BMVC 2023).
"""
