"""Launches of Triton kernels, and whether Triton works on a device.

Every launch of this package goes through `launch`, so that tests can count them.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

WARPS = 8


def uses_triton(device: torch.device) -> bool:
    """Return whether passes over tensors on a device are Triton kernels.

    Under `torch.compile` they are not: the compiler writes its own. Call it through the module
    (`launching.uses_triton(...)`), so that tests can choose.

    Example:
        >>> uses_triton(torch.device("cpu"))
        False
    """
    return device.type == "cuda" and not torch.compiler.is_compiling() and _works(device)


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its first tensor.

    Products and sums are rounded one by one (no fused multiply-add), as in all other forms.

    Args:
        kernel: a function of `triton.jit`.
        programs: size of the grid.
        arguments: its arguments, with at least one tensor.
        constants: its compile-time constants.

    Example:
        >>> from torch_feather.probe_kernel import probe
        >>> if torch.cuda.is_available():
        ...     launch(probe, 1, torch.zeros(1, device="cuda"))
    """
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device_of(first):
        kernel[(programs,)](*arguments, **constants, num_warps=WARPS, enable_fp_fusion=False)


@cache
def _works(device: torch.device) -> bool:
    """Return whether a kernel works on `device`; cached."""
    try:
        from .probe_kernel import probe

        launch(probe, 1, torch.zeros(1, device=device))
    except ImportError:  # not on this platform
        return False
    except Exception as error:  # no C compiler, an old device, ...
        warnings.warn(
            f"Triton does not work on {device}: {error}. Passes over the weights are slower "
            "PyTorch operations.",
            stacklevel=2,
        )
        return False
    return True
