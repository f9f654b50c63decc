"""Operations of PyTorch that move elements, and pooling."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import NativeExportError
from .expressions import largest, operand, total
from .lowering import Builder, transform
from .program import View
from .resampling import RESAMPLINGS

aten = torch.ops.aten


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
    found: View = RESAMPLINGS[aten.adaptive_avg_pool2d.default](builder, view, [rows, columns])
    return found


def _pixel_shuffle(builder: Builder, x: Any, factor: int) -> View:
    view = builder.view(x)
    batch, channels, height, width = view.shape
    split = builder.reshape(view, (batch, channels // factor**2, factor, factor, height, width))
    moved = transform(split, lambda t: t.permute(0, 1, 4, 2, 5, 3))
    return builder.reshape(moved, (batch, -1, height * factor, width * factor))


def _flatten(builder: Builder, x: Any, start: int = 0, end: int = -1) -> View:
    shape = builder.view(x).shape
    start, end = start % len(shape), end % len(shape)
    merged = math.prod(shape[start : end + 1])
    return builder.reshape(x, (*shape[:start], merged, *shape[end + 1 :]))


SHAPES: dict[Any, Callable[..., Any]] = {
    aten.reshape.default: Builder.reshape,
    aten._unsafe_view.default: Builder.reshape,
    aten.flatten.using_ints: _flatten,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.roll.default: _roll,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.avg_pool2d.default: _avg_pool2d,
    aten.max_pool2d.default: _max_pool2d,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten.pixel_shuffle.default: _pixel_shuffle,
}
