"""The operations of PyTorch that native libraries support, besides sparse layers and views.

Each function adds an operation to a program. Its arguments are those of the operation; tensors are
`View`s, or constants of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import NativeExportError
from .expressions import Expr, call, clamp, expr, largest, operand, sigmoid, total
from .lowering import Builder, transform
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


ELEMENTWISE: dict[Any, Callable[..., Expr]] = {
    aten.relu.default: lambda x: clamp(x, 0.0, None),
    aten.hardtanh.default: lambda x, low=-1.0, high=1.0: clamp(x, low, high),
    aten.clamp.default: lambda x, min=None, max=None: clamp(x, min, max),
    aten.sigmoid.default: sigmoid,
    aten.hardsigmoid.default: _hard_sigmoid,
    aten.silu.default: lambda x: x * sigmoid(x),
    aten.hardswish.default: lambda x: x * _hard_sigmoid(x),
    aten.gelu.default: _gelu,
    aten.leaky_relu.default: _leaky_relu,
    aten.elu.default: _elu,
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


_mean = reduction(lambda x, n: total(x) / n)


def _softmax(builder: Builder, x: Any, dim: int, dtype: Any = None, log: bool = False) -> View:
    view = builder.view(x)
    high = reduction(lambda x, n: largest(x))(builder, view, [dim], True)
    shifted = operand(0) - operand(1)
    moved = [_last(builder, v, [dim]) for v in (view, high)]
    found = builder.compute(total(call("exp", shifted)), *moved, reduced=1)
    shape = [1 if d == dim % len(view.shape) else n for d, n in enumerate(view.shape)]
    sums = builder.reshape(found, shape)
    formula = shifted - call("log", operand(2)) if log else call("exp", shifted) / operand(2)
    return builder.compute(formula, view, high, sums)


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
    batch, channels, *rest = view.shape
    parts = builder.reshape(view, (batch, groups, -1))
    found = builder.reshape(_normalized(builder, parts, [2], eps), view.shape)
    wide = [
        None if w is None else transform(builder.view(w), lambda t: t.view(-1, *[1] * len(rest)))
        for w in (weight, bias)
    ]
    return _affine(builder, found, *wide)


def _matmul(builder: Builder, a: Any, b: Any) -> View:
    a, b = builder.view(a), builder.view(b)
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise NativeExportError("both factors need at least two dimensions")
    rows = transform(a, lambda t: t.unsqueeze(-2))
    columns = transform(b, lambda t: t.transpose(-1, -2).unsqueeze(-3))
    return builder.compute(total(operand(0) * operand(1)), rows, columns, reduced=1)


def _linear(builder: Builder, x: Any, weight: Any, bias: Any = None) -> View:
    found = _matmul(builder, x, transform(builder.view(weight), lambda t: t.t()))
    return found if bias is None else _affine(builder, found, None, bias)


def _addmm(builder: Builder, bias: Any, a: Any, b: Any) -> View:
    return _affine(builder, _matmul(builder, a, b), None, bias)


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
    rows = transform(q, lambda t: t.unsqueeze(-2))
    columns = transform(k, lambda t: t.unsqueeze(-3))
    scores = total(operand(0) * operand(1)) * scale
    masks = []
    if mask is not None:
        scores = scores + operand(2)
        masks = [transform(builder.view(mask), lambda t: t.unsqueeze(-1))]
    found = builder.compute(scores, rows, columns, *masks, reduced=1)
    return _matmul(builder, _softmax(builder, found, -1), v)


def _cat(builder: Builder, tensors: Sequence[Any], dim: int = 0) -> View:
    views = [builder.view(x) for x in tensors]
    views = [v for v in views if v.shape != (0,)]
    shape = list(views[0].shape)
    dim %= len(shape)
    shape[dim] = sum(v.shape[dim] for v in views)
    out, start = builder.empty(tuple(shape)), 0
    for v in views:
        length = v.shape[dim]
        builder.copy(v, transform(out, lambda t, s=start, n=length: t.narrow(dim, s, n)))  # type: ignore[misc]
        start += length
    return out


def _stack(builder: Builder, tensors: Sequence[Any], dim: int = 0) -> View:
    return _cat(builder, [transform(builder.view(x), lambda t: t.unsqueeze(dim)) for x in tensors],
                dim)  # fmt: skip


def _roll(builder: Builder, x: Any, shifts: Any, dims: Any = ()) -> View:
    view = builder.view(x)
    shifts, dims = ([s] if isinstance(s, int) else list(s) for s in (shifts, dims))
    if len(dims) != len(shifts):
        raise NativeExportError("roll needs a dimension for each shift")
    for shift, dim in zip(shifts, dims, strict=True):
        cut = -shift % view.shape[dim]
        parts = [
            transform(view, lambda t, d=dim, c=cut: t.narrow(d, c, t.shape[d] - c)),  # type: ignore[misc]
            transform(view, lambda t, d=dim, c=cut: t.narrow(d, 0, c)),  # type: ignore[misc]
        ]
        view = _cat(builder, parts, dim)
    return view


def _pad(
    builder: Builder, x: Any, sides: Sequence[int], mode: Any = "constant", value: Any = None
) -> View:
    if not isinstance(mode, str):  # constant_pad_nd has no mode
        mode, value = "constant", mode
    if mode != "constant":
        raise NativeExportError(f"padding mode {mode!r} is not supported")
    view = builder.view(x)
    rank = len(view.shape)
    before = [0] * rank
    shape = list(view.shape)
    for i, (a, b) in enumerate(zip(sides[::2], sides[1::2], strict=True)):
        dim = rank - 1 - i
        crop_a, crop_b = max(0, -a), max(0, -b)
        n = view.shape[dim] - crop_a - crop_b
        view = transform(view, lambda t, d=dim, c=crop_a, n=n: t.narrow(d, c, n))  # type: ignore[misc]
        before[dim] = max(0, a)
        shape[dim] = n + max(0, a) + max(0, b)
    out = builder.empty(tuple(shape))
    builder.fill(out, value or 0.0)

    def inside(t: Tensor) -> Tensor:
        for d, start in enumerate(before):
            t = t.narrow(d, start, view.shape[d])
        return t

    builder.copy(view, transform(out, inside))
    return out


# Pooling: windows of a padded copy are views with overlapping strides.


def _windows(
    builder: Builder, x: Any, kernel: Any, stride: Any, padding: Any, fill: float, out: Any
) -> View:
    """Return a tensor (batch, channels, rows, columns, window rows, window columns)."""
    view = builder.view(x)
    sides = []
    for i in (1, 0):
        reach = (out[i] - 1) * stride[i] + kernel[i]
        sides += [padding[i], max(0, reach - view.shape[2 + i] - padding[i])]
    if any(sides):
        view = _pad(builder, view, sides, "constant", fill)

    def windows(t: Tensor) -> Tensor:
        a, b, c, d = t.stride()
        shape = (*t.shape[:2], *out, *kernel)
        strides = (a, b, c * stride[0], d * stride[1], c, d)
        return t.as_strided(shape, strides, t.storage_offset())

    return transform(view, windows)


def _pair(value: Any, default: Any = None) -> list[int]:
    value = default if value is None or value == [] else value
    return [value, value] if isinstance(value, int) else list(value) * (2 // len(value))


def _avg_pool2d(
    builder: Builder,
    x: Any,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> View:
    view = builder.view(x)
    if len(view.shape) != 4:
        raise NativeExportError("pooling needs four dimensions")
    ones, options = torch.ones(1, 1, *view.shape[2:]), (kernel, stride or kernel, padding)
    mean = F.avg_pool2d(ones, *options, ceil_mode, count_include_pad, divisor)
    counts = F.avg_pool2d(ones, *options, ceil_mode, divisor_override=1)
    factor = (mean / counts)[0, 0, :, :, None, None]
    kernel, stride, padding = _pair(kernel), _pair(stride, kernel), _pair(padding)
    windows = _windows(builder, view, kernel, stride, padding, 0.0, mean.shape[2:])
    formula = total(operand(0)) * operand(1)
    return builder.compute(formula, windows, factor, reduced=2)


def _max_pool2d(
    builder: Builder,
    x: Any,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> View:
    view = builder.view(x)
    if _pair(dilation) != [1, 1] or len(view.shape) != 4:
        raise NativeExportError("dilated max pooling and pooling of single images")
    blank = torch.zeros(1, 1, *view.shape[2:])
    out = F.max_pool2d(blank, kernel, stride or kernel, padding, 1, ceil_mode).shape[2:]
    kernel, stride, padding = _pair(kernel), _pair(stride, kernel), _pair(padding)
    windows = _windows(builder, view, kernel, stride, padding, -math.inf, out)
    return builder.compute(largest(operand(0)), windows, reduced=2)


def _adaptive_avg_pool2d(builder: Builder, x: Any, size: Any) -> View:
    view = builder.view(x)
    height, width = view.shape[-2:]
    rows, columns = (n if m is None else m for n, m in zip((height, width), size, strict=True))
    if height % rows == 0 and width % columns == 0:
        kernel = [height // rows, width // columns]
        return _avg_pool2d(builder, view, kernel, kernel)
    # Windows differ in size: products with the matrices of the two dimensions.
    for n, m in ((width, columns), (height, rows)):
        matrix = F.adaptive_avg_pool1d(torch.eye(n), m)
        view = transform(_matmul(builder, view, matrix), lambda t: t.transpose(-1, -2))
    return view


def _upsample_nearest(
    builder: Builder, x: Any, size: Any = None, factors: Any = None, *more: Any
) -> View:
    view = builder.view(x)
    batch, channels, height, width = view.shape
    rows, columns = size or (int(height * factors[0]), int(width * factors[1]))
    if rows % height or columns % width:
        raise NativeExportError("nearest upsampling needs an integer factor")
    a, b = rows // height, columns // width
    repeated = transform(
        view,
        lambda t: t[:, :, :, None, :, None].expand(batch, channels, height, a, width, b),
    )
    return builder.reshape(repeated, (batch, channels, rows, columns))


def _pixel_shuffle(builder: Builder, x: Any, factor: int) -> View:
    view = builder.view(x)
    batch, channels, height, width = view.shape
    split = builder.reshape(view, (batch, channels // factor**2, factor, factor, height, width))
    moved = transform(split, lambda t: t.permute(0, 1, 4, 2, 5, 3))
    return builder.reshape(moved, (batch, -1, height * factor, width * factor))


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


SUPPORTED: dict[Any, Callable[..., Any]] = {
    **{target: elementwise(formula) for target, formula in ELEMENTWISE.items()},
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.reshape.default: Builder.reshape,
    aten.flatten.using_ints: lambda b, x, s=0, e=-1: b.reshape(x, _flat(b.view(x).shape, s, e)),
    aten.mean.dim: _mean,
    aten.mean.default: _mean,
    aten.sum.dim_IntList: reduction(lambda x, n: total(x)),
    aten.amax.default: reduction(lambda x, n: largest(x)),
    aten.softmax.int: _softmax,
    aten._softmax.default: lambda b, x, dim, half: _softmax(b, x, dim),
    aten.log_softmax.int: lambda b, x, dim, dtype=None: _softmax(b, x, dim, log=True),
    aten._log_softmax.default: lambda b, x, dim, half: _softmax(b, x, dim, log=True),
    aten.layer_norm.default: _layer_norm,
    aten.native_layer_norm.default: lambda b, *args: [_layer_norm(b, *args), None, None],
    aten.group_norm.default: _group_norm,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.linear.default: _linear,
    aten.scaled_dot_product_attention.default: _attention,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.roll.default: _roll,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.avg_pool2d.default: _avg_pool2d,
    aten.max_pool2d.default: _max_pool2d,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten.upsample_nearest2d.vec: _upsample_nearest,
    aten.pixel_shuffle.default: _pixel_shuffle,
}


def _flat(shape: tuple[int, ...], start: int, end: int) -> tuple[int, ...]:
    start, end = start % len(shape), end % len(shape)
    return (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])
