"""Functions that write parameters, without recording their operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def no_grad(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return the function with gradients turned off during a call, as `torch.no_grad`.

    Functions of a step call each other. If gradients are off already, this decorator only calls
    the function.

    Args:
        function: any function.

    Example:
        >>> @no_grad
        ... def add(w):
        ...     return w + 1
        >>> add(torch.ones(1, requires_grad=True)).requires_grad
        False
    """

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return call
