"""Operations of PyTorch that reduce dimensions: sums, norms, softmax, products of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import NativeExportError
from .expressions import Expr, call, largest, operand, total
from .lowering import Builder, transform
from .products import ROWS
from .program import View

aten = torch.ops.aten

FLOAT = torch.finfo(torch.float32)
LARGEST, SMALLEST = FLOAT.max, FLOAT.tiny


def _last(builder: Builder, x: Any, dims: Sequence[int]) -> View:
    """Return a tensor with these dimensions moved to the end."""
    view = builder.view(x)
    dims = sorted(d % len(view.shape) for d in dims)
    rest = [d for d in range(len(view.shape)) if d not in dims]
    return transform(view, lambda t: t.permute(*rest, *dims))


def reduction(formula: Callable[[Expr, int], Expr]) -> Callable[..., View]:
    """Return an operation that reduces dimensions.

    Args:
        formula: of the element and the number of elements that are reduced to one.

    Example:
        >>> from .program import Buffer, Program
        >>> add = reduction(lambda x, n: total(x))
        >>> add(Builder(Program(1)), View.contiguous(Buffer("work", 6), (2, 3)), [1], True).shape
        (2, 1)
    """

    def add(
        builder: Builder, x: Any, dims: Any = None, keepdim: bool = False, dtype: Any = None
    ) -> View:
        view = builder.view(x)
        rank = len(view.shape)
        if dims is None or dims == []:
            dims = range(rank)
        dims = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
        count = math.prod(view.shape[d] for d in dims)
        moved = _last(builder, view, list(dims))
        found = builder.compute(formula(operand(0), count), moved, reduced=len(dims))
        if keepdim:
            shape = [1 if d in dims else n for d, n in enumerate(view.shape)]
            return builder.reshape(found, shape)
        return found

    return add


_sum = reduction(lambda x, n: total(x))
_mean = reduction(lambda x, n: total(x) / n)


def _softmax(builder: Builder, x: Any, dim: int, dtype: Any = None, log: bool = False) -> View:
    view = builder.view(x)
    high = reduction(lambda x, n: largest(x))(builder, view, [dim], True)
    powers = builder.compute(call("exp", operand(0) - operand(1)), view, high)
    sums = _sum(builder, powers, [dim], True)
    if log:
        return builder.compute(operand(0) - operand(1) - call("log", operand(2)), view, high, sums)
    return builder.compute(operand(0) / operand(1), powers, sums)


def _normalized(builder: Builder, view: View, dims: Sequence[int], eps: float) -> View:
    """Return a tensor with mean 0 and variance 1 over dimensions."""
    mean = _mean(builder, view, dims, True)
    count = math.prod(view.shape[d] for d in dims)
    moved = [_last(builder, v, dims) for v in (view, mean)]
    centered = operand(0) - operand(1)
    found = builder.compute(
        1.0 / call("sqrt", total(centered * centered) / count + eps), *moved, reduced=len(dims)
    )
    scale = builder.reshape(found, mean.shape)
    return builder.compute(centered * operand(2), view, mean, scale)


def _affine(builder: Builder, x: View, weight: Any, bias: Any) -> View:
    """Return x * weight + bias; both may be None."""
    if weight is None and bias is None:
        return x
    given = [w for w in (weight, bias) if w is not None]
    formula = operand(0) if weight is None else operand(0) * operand(1)
    if bias is not None:
        formula = formula + operand(len(given))
    return builder.compute(formula, x, *given)


def _layer_norm(
    builder: Builder,
    x: Any,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> View:
    view = builder.view(x)
    dims = [len(view.shape) - 1 - i for i in range(len(shape))]
    return _affine(builder, _normalized(builder, view, dims, eps), weight, bias)


def _group_norm(
    builder: Builder,
    x: Any,
    groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> View:
    view = builder.view(x)
    batch, _, *rest = view.shape
    parts = builder.reshape(view, (batch, groups, -1))
    found = builder.reshape(_normalized(builder, parts, [2], eps), view.shape)
    wide = [
        None if w is None else transform(builder.view(w), lambda t: t.view(-1, *[1] * len(rest)))
        for w in (weight, bias)
    ]
    return _affine(builder, found, *wide)


def matmul(builder: Builder, a: Any, b: Any) -> View:
    """Add a product of matrices, with broadcasting of the other dimensions.

    Args:
        builder: of the program.
        a: (..., n, k).
        b: (..., k, m).

    Raises:
        NativeExportError: a factor has fewer than two dimensions.

    Example:
        >>> from .program import Program
        >>> matmul(Builder(Program(1)), torch.ones(2, 3), torch.ones(3, 4)).shape
        (2, 4)
    """
    return _product(builder, total(operand(0) * operand(1)), a, b)


def _product(builder: Builder, formula: Expr, a: Any, b: Any, *more: View) -> View:
    """Add a nest over the products of rows of `a` and columns of `b`, summed by the formula."""
    a, b = builder.view(a), builder.view(b)
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise NativeExportError("both factors need at least two dimensions")
    if builder.tiles and b.strides[-1] != 1 and b.shape[-1] > 1 and a.shape[-2] >= ROWS:
        b = builder.copy(b)
    rows = transform(a, lambda t: t.unsqueeze(-2))
    columns = transform(b, lambda t: t.transpose(-1, -2).unsqueeze(-3))
    return builder.compute(formula, rows, columns, *more, reduced=1)


def _linear(builder: Builder, x: Any, weight: Any, bias: Any = None) -> View:
    x = builder.view(x)
    if isinstance(weight, Tensor):
        factor = builder.transposed(weight, math.prod(x.shape[:-1]))
    else:
        factor = transform(weight, lambda t: t.t())
    found = matmul(builder, x, factor)
    return found if bias is None else _affine(builder, found, None, bias)


def _addmm(builder: Builder, bias: Any, a: Any, b: Any) -> View:
    return _affine(builder, matmul(builder, a, b), None, bias)


def _attention(
    builder: Builder,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> View:
    q, k = builder.view(q), builder.view(k)
    if dropout or enable_gqa:
        raise NativeExportError("dropout and enable_gqa are not supported")
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    if causal:
        n, m = q.shape[-2], k.shape[-2]
        mask = torch.full((n, m), -math.inf).triu(1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = total(operand(0) * operand(1)) * scale
    masks = []
    if mask is not None:
        scores = scores + operand(2)
        masks = [transform(builder.view(mask), lambda t: t.unsqueeze(-1))]
    keys = transform(k, lambda t: t.transpose(-1, -2))
    found = _product(builder, scores, q, keys, *masks)
    return matmul(builder, _probabilities(builder, found), v)


def _probabilities(builder: Builder, scores: View) -> View:
    """Return the softmax of each row; as in PyTorch, 0 if all scores of a row are -inf."""
    high = reduction(lambda x, n: call("max", largest(x), -LARGEST))(builder, scores, [-1], True)
    powers = builder.compute(call("exp", operand(0) - operand(1)), scores, high)
    sums = _sum(builder, powers, [-1], True)
    return builder.compute(operand(0) / call("max", operand(1), SMALLEST), powers, sums)


def _batch_norm(
    builder: Builder,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    eps: float,
) -> list[Any]:
    rank = len(builder.view(x).shape) - 2
    scale = (var.double() + eps).rsqrt() * (1.0 if weight is None else weight.double())
    shift = -mean.double() * scale + (0.0 if bias is None else bias.double())
    wide = [v.float().view(-1, *[1] * rank) for v in (scale, shift)]
    return [_affine(builder, builder.view(x), *wide), None, None]


REDUCTIONS: dict[Any, Callable[..., Any]] = {
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.mean.dim: _mean,
    aten.mean.default: _mean,
    aten.sum.dim_IntList: _sum,
    aten.sum.default: _sum,
    aten.amax.default: reduction(lambda x, n: largest(x)),
    aten.softmax.int: _softmax,
    aten._softmax.default: lambda b, x, dim, half: _softmax(b, x, dim),
    aten.log_softmax.int: lambda b, x, dim, dtype=None: _softmax(b, x, dim, log=True),
    aten._log_softmax.default: lambda b, x, dim, half: _softmax(b, x, dim, log=True),
    aten.layer_norm.default: _layer_norm,
    aten.native_layer_norm.default: lambda b, *args: [_layer_norm(b, *args), None, None],
    aten.group_norm.default: _group_norm,
    aten.matmul.default: matmul,
    aten.bmm.default: matmul,
    aten.mm.default: matmul,
    aten.addmm.default: _addmm,
    aten.linear.default: _linear,
    aten.scaled_dot_product_attention.default: _attention,
}
