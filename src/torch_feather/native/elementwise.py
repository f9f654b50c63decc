"""Elementwise operations of PyTorch, as formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .expressions import Expr, call, clamp, operand, sigmoid
from .lowering import Builder
from .program import View

aten = torch.ops.aten


def elementwise(formula: Callable[..., Expr]) -> Callable[..., View]:
    """Return an operation that computes a formula for each element, with broadcasting.

    Example:
        >>> from .program import Buffer, Program
        >>> square = elementwise(lambda x: x * x)
        >>> square(Builder(Program(1)), View.contiguous(Buffer("work", 4), (4,))).shape
        (4,)
    """

    def add(builder: Builder, *args: Any, **kwargs: Any) -> View:
        tensors = [a for a in args if isinstance(a, View | Tensor)]
        numbers = iter(range(len(tensors)))
        given = [operand(next(numbers)) if isinstance(a, View | Tensor) else a for a in args]
        return builder.compute(formula(*given, **kwargs), *tensors)

    return add


def _gelu(x: Expr, approximate: str = "none") -> Expr:
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1.0 + call("tanh", inner))
    return 0.5 * x * (1.0 + call("erf", x * math.sqrt(0.5)))


def _leaky_relu(x: Expr, slope: float = 0.01) -> Expr:
    return call("select", call("less", x, 0.0), x * slope, x)


def _elu(x: Expr, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Expr:
    low = (call("exp", x * input_scale) - 1.0) * alpha * scale
    return call("select", call("less", 0.0, x), x * scale, low)


def _softplus(x: Expr, beta: float = 1.0, threshold: float = 20.0) -> Expr:
    soft = call("log", 1.0 + call("exp", call("min", x * beta, threshold))) / beta
    return call("select", call("less", threshold, x * beta), x, soft)


def _hard_sigmoid(x: Expr) -> Expr:
    return clamp(x + 3.0, 0.0, 6.0) / 6.0


def _pow(x: Expr, power: Expr | float) -> Expr:
    return x * x if power == 2 else call("pow", x, power)


FORMULAS: dict[Any, Callable[..., Expr]] = {
    aten.relu.default: lambda x: clamp(x, 0.0, None),
    aten.relu6.default: lambda x: clamp(x, 0.0, 6.0),
    aten.hardtanh.default: lambda x, low=-1.0, high=1.0: clamp(x, low, high),
    aten.clamp.default: lambda x, min=None, max=None: clamp(x, min, max),
    aten.sigmoid.default: sigmoid,
    aten.hardsigmoid.default: _hard_sigmoid,
    aten.silu.default: lambda x: x * sigmoid(x),
    aten.hardswish.default: lambda x: x * _hard_sigmoid(x),
    aten.gelu.default: _gelu,
    aten.leaky_relu.default: _leaky_relu,
    aten.elu.default: _elu,
    aten.celu.default: lambda x, alpha=1.0: _elu(x, alpha, 1.0, 1.0 / alpha),
    aten.selu.default: lambda x: _elu(x, 1.6732632423543772, 1.0507009873554805),
    aten.softplus.default: _softplus,
    aten.mish.default: lambda x: x * call("tanh", _softplus(x)),
    aten.tanh.default: lambda x: call("tanh", x),
    aten.exp.default: lambda x: call("exp", x),
    aten.log.default: lambda x: call("log", x),
    aten.erf.default: lambda x: call("erf", x),
    aten.sqrt.default: lambda x: call("sqrt", x),
    aten.rsqrt.default: lambda x: 1.0 / call("sqrt", x),
    aten.abs.default: lambda x: call("fabs", x),
    aten.neg.default: lambda x: -x,
    aten.reciprocal.default: lambda x: 1.0 / x,
    aten.add.Tensor: lambda a, b, alpha=1: a + (b if alpha == 1 else alpha * b),
    aten.sub.Tensor: lambda a, b, alpha=1: a - (b if alpha == 1 else alpha * b),
    aten.add.Scalar: lambda a, b, alpha=1: a + alpha * b,
    aten.sub.Scalar: lambda a, b, alpha=1: a - alpha * b,
    aten.rsub.Scalar: lambda a, b, alpha=1: b - (a if alpha == 1 else a * alpha),
    aten.rsub.Tensor: lambda a, b, alpha=1: b - (a if alpha == 1 else a * alpha),
    aten.mul.Tensor: lambda a, b: a * b,
    aten.mul.Scalar: lambda a, b: a * b,
    aten.div.Tensor: lambda a, b: a / b,
    aten.div.Scalar: lambda a, b: a / b,
    aten.maximum.default: lambda a, b: call("max", a, b),
    aten.minimum.default: lambda a, b: call("min", a, b),
    aten.pow.Tensor_Scalar: _pow,
    aten.where.self: lambda c, a, b: call("select", c, a, b),
    # Views without a copy in PyTorch, or copies that nothing writes to.
    aten.clone.default: lambda x, memory_format=None: x,
    aten.contiguous.default: lambda x, memory_format=None: x,
}

ELEMENTWISE: dict[Any, Callable[..., View]] = {
    target: elementwise(formula) for target, formula in FORMULAS.items()
}
