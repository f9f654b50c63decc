"""Interpolation and adaptive pooling, as sums of windows of rows and of columns.

A row of the result is a sum of successive rows of the input. Rows of the result at equal distances
often read windows at equal distances, such as every second row for a factor of 2. One loop nest
computes all of these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from ..runtime.resampling import ADAPTIVE_MAX, RESAMPLES, arguments, matrices
from .errors import NativeExportError
from .expressions import Expr, largest, operand, total
from .lowering import Builder, transform
from .program import View
from .reductions import matmul

aten = torch.ops.aten
MOST_NESTS = 32  # beyond, a product with the matrix is shorter


class Run(NamedTuple):
    """Positions of a result at equal distances, whose windows are at equal distances.

    Attributes:
        start: the first position of the result.
        step: the distance to the next one.
        length: number of positions.
        first: where the first window begins.
        shift: the distance to the next window.
        size: size of the windows.

    Example:
        >>> run = Run(start=0, step=2, length=2, first=0, shift=1, size=2)
        >>> run.weights(np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.2, 0.8]])).tolist()
        [[0.5, 0.5], [0.2, 0.8]]
    """

    start: int
    step: int
    length: int
    first: int
    shift: int
    size: int

    def weights(self, matrix: np.ndarray) -> Tensor:
        """Return the weights of the windows, (length, size)."""
        rows = (matrix[self.start + k * self.step] for k in range(self.length))
        firsts = (self.first + k * self.shift for k in range(self.length))
        parts = [row[first : first + self.size] for row, first in zip(rows, firsts, strict=True)]
        return torch.from_numpy(np.array(parts))


def runs_of(matrix: np.ndarray) -> list[Run]:
    """Return all rows of a matrix in as few runs as possible.

    Args:
        matrix: its rows have numbers that are not 0, which are in a window.

    Example:
        >>> runs_of(np.eye(3).repeat(2, 0))
        [Run(start=0, step=2, length=3, first=0, shift=1, size=1), \
Run(start=1, step=2, length=3, first=0, shift=1, size=1)]
    """
    windows = [(int(i[0]), int(i[-1] - i[0] + 1)) for i in (row.nonzero()[0] for row in matrix)]
    steps = range(1, min(MOST_NESTS, len(windows)) + 1)
    return min((_runs(windows, step) for step in steps), key=len)


def _runs(windows: list[tuple[int, int]], step: int) -> list[Run]:
    """Return the runs whose positions have a distance, from the first position and size of each."""
    found = []
    for residue in range(step):
        run: Run | None = None
        for position in range(residue, len(windows), step):
            first, size = windows[position]
            if run is not None and size == run.size:
                shift = first - run.first if run.length == 1 else run.shift
                if first == run.first + run.length * shift:
                    run = run._replace(length=run.length + 1, shift=shift)
                    continue
            if run is not None:
                found.append(run)
            run = Run(position, step, 1, first, 0, size)
        if run is not None:
            found.append(run)
    return found


def combined(builder: Builder, x: Any, matrix: np.ndarray, dim: int, is_max: bool = False) -> View:
    """Add the products of a matrix with all lines of a tensor along a dimension.

    Args:
        builder: of the program.
        x: the tensor.
        matrix: (size of the result, size of x).
        dim: the dimension.
        is_max: whether to take the largest element whose weight is not 0 instead of the sum.

    Example:
        >>> from .program import Program
        >>> combined(Builder(Program(1)), torch.ones(3, 4), np.eye(3).repeat(2, 0), 0).shape
        (6, 4)
    """
    view = transform(builder.view(x), lambda t: t.movedim(dim, -1))
    runs = runs_of(matrix)
    if len(runs) > MOST_NESTS and not is_max:
        found = matmul(builder, view, torch.from_numpy(np.ascontiguousarray(matrix.T)))
        return transform(found, lambda t: t.movedim(-1, dim))
    out = builder.empty((*view.shape[:-1], len(matrix)))
    for run in runs:

        def windows(t: Tensor, run: Run = run) -> Tensor:
            shape, element = (*t.shape[:-1], run.length, run.size), t.stride(-1)
            strides = (*t.stride()[:-1], run.shift * element, element)
            return t.as_strided(shape, strides, t.storage_offset() + run.first * element)

        def positions(t: Tensor, run: Run = run) -> Tensor:
            return t[..., run.start :: run.step][..., : run.length]

        given: list[Any] = [transform(view, windows)]
        formula: Expr = largest(operand(0))
        if not is_max:
            given.append(run.weights(matrix))
            formula = total(operand(0) * operand(1))
        builder.compute(formula, *given, reduced=1, out=transform(out, positions))
    return transform(out, lambda t: t.movedim(-1, dim))


def _resample(function: OpOverload, builder: Builder, x: Any, *args: Any, **kwargs: Any) -> Any:
    view = builder.view(x)
    height, width = view.shape[-2:]
    found = matrices(function, (height, width), arguments(function, (x, *args), kwargs))
    if found is None:
        raise NativeExportError("this version of PyTorch computes something else")
    is_max = function is ADAPTIVE_MAX
    a, b = (repeats(matrix) for matrix in found)
    if a and b and not is_max:
        repeated = transform(
            view, lambda t: t[..., :, None, :, None].expand(*t.shape[:-1], a, width, b)
        )
        return builder.reshape(repeated, (*view.shape[:-2], height * a, width * b))
    axes = list(zip((-2, -1), found, strict=True))
    if len(found[0]) > height:
        axes.reverse()  # fewer rows are left to combine
    for dim, matrix in axes:
        view = combined(builder, view, matrix, dim, is_max)
    return [view, None] if is_max else view


def repeats(matrix: np.ndarray) -> int:
    """Return how often a matrix repeats each line; 0 if it does something else.

    Example:
        >>> repeats(np.eye(3).repeat(2, 0)), repeats(np.eye(3)[:2])
        (2, 0)
    """
    size, lines = matrix.shape
    factor = size // lines
    return factor if np.array_equal(matrix, np.eye(lines).repeat(factor, 0)) else 0


RESAMPLINGS: dict[Any, Callable[..., Any]] = {
    function: partial(_resample, function) for function in RESAMPLES
}
