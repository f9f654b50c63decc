"""The smallest Triton kernel, which shows whether Triton works on a device."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def probe(number):
    """Add one to a number.

    Example:
        >>> probe.fn.__name__
        'probe'
    """
    tl.store(number, tl.load(number) + 1.0)
