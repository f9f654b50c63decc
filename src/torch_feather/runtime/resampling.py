"""Interpolation and adaptive pooling: rows and columns that are combined by two matrices.

Such a function computes A · x · Bᵀ of each channel x. A row of the result is a sum of some rows of
x: their weights are the numbers of a row of A that are not 0. B combines columns. A weight and its
position are a tap. Adaptive max pooling takes the largest pixel instead of the sum.

    interpolation       nearest, bilinear and bicubic, also with antialiasing
    adaptive pooling    also with windows of unequal sizes
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch._ops import OpOverload
from torch.fx import Node

from .planes import PlaneLayout, Planes
from .steps import Operation

aten = torch.ops.aten
ADAPTIVE_MAX = aten.adaptive_max_pool2d.default  # returns positions, too
RESAMPLES = {
    *(aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default),
    *(aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact2d.default),
    *(aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default),
    *(aten._upsample_bilinear2d_aa.vec, aten._upsample_bilinear2d_aa.default),
    *(aten.upsample_bicubic2d.vec, aten.upsample_bicubic2d.default),
    *(aten._upsample_bicubic2d_aa.vec, aten._upsample_bicubic2d_aa.default),
    *(aten.adaptive_avg_pool2d.default, ADAPTIVE_MAX),
}


class ResamplingTaps(NamedTuple):
    """What is combined to the rows, or to the columns, of a result.

    Attributes:
        positions: int32 (taps, size of the result), rows or columns of the input. The number of
            taps is even: if there are fewer, the last one is repeated, and its weight divided.
        weights: float32 of the same shape.

    Example:
        >>> ResamplingTaps.of(np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])).positions.tolist()
        [[0, 0], [0, 1], [0, 2], [0, 2]]
    """

    positions: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, matrix: np.ndarray) -> ResamplingTaps:
        """Return the taps of a matrix, which has a number that is not 0 in each row."""
        positions, weights = [], []
        most = max(2, int(np.count_nonzero(matrix, axis=1).max()))
        count = most + most % 2
        for row in matrix:
            (found,) = row.nonzero()
            missing = count - len(found)
            values = row[found]
            values[-1] /= missing + 1
            positions.append(np.pad(found, (0, missing), "edge"))
            weights.append(np.pad(values, (0, missing), "edge"))
        return cls(
            np.ascontiguousarray(np.array(positions, np.int32).T),
            np.ascontiguousarray(np.array(weights, np.float32).T),
        )


def matrices(
    function: OpOverload, given: Sequence[int], named: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the matrices A and B of interpolation or adaptive average pooling, in float32.

    They are what the function itself makes of images of two equal columns or rows, in which one
    pixel is 1 and all others are 0. (With one column, `_upsample_bilinear2d_aa` of PyTorch 2.14
    confuses the strides.)

    Args:
        function: one of `RESAMPLES`. The result is for average pooling if it is max pooling.
        given: rows and columns of the input.
        named: arguments by name, without the input.

    Returns:
        None if the function is none of this kind.

    Example:
        >>> function = aten.adaptive_avg_pool2d.default
        >>> matrices(function, (3, 2), {"output_size": [2, 2]})[0].tolist()
        [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    """
    function = aten.adaptive_avg_pool2d.default if function is ADAPTIVE_MAX else function
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    image = torch.linspace(-1, 1, math.prod(given), **options).cos().view(1, 1, *given)
    expected = function(image, **named)[0, 0]
    found = []
    for axis, size in enumerate(given):
        one = {**named, **_for_one_axis(named, axis, expected.shape[axis])}
        identity = torch.eye(size, **options).view(1, size, size, 1).expand(-1, -1, -1, 2)
        x = (identity if axis == 0 else identity.transpose(2, 3)).contiguous()
        found.append(function(x, **one).select(3 - axis, 0)[0].numpy().T)
    a, b = found
    product = torch.from_numpy(a @ image[0, 0].numpy() @ b.T)
    return (a, b) if torch.allclose(expected, product, atol=1e-5) else None


def arguments(function: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the arguments of a function by name, without the first one.

    Example:
        >>> arguments(aten.adaptive_avg_pool2d.default, (torch.ones(1, 1, 3, 3), [2, 2]), {})
        {'output_size': [2, 2]}
    """
    names = [argument.name for argument in function._schema.arguments]
    return dict(zip(names[1:], args[1:], strict=False)) | dict(kwargs)


def _matrices_of(node: Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the matrices of a node; None if a size or a factor depends on the input."""
    source, target = node.args[0], node.target
    assert isinstance(source, Node)
    assert isinstance(target, OpOverload)
    value = node.meta["val"][0] if target is ADAPTIVE_MAX else node.meta["val"]
    given, result = source.meta["val"].shape[2:], value.shape[2:]
    known = all(isinstance(n, int) and n > 0 for n in (*given, *result))
    if not known or len(node.all_input_nodes) > 1:
        return None
    return matrices(target, given, arguments(target, node.args, node.kwargs))


def _for_one_axis(named: Mapping[str, Any], axis: int, size: int) -> dict[str, Any]:
    """Return the arguments that must change if the other axis has two pixels, and keeps them.

    Args:
        named: arguments by name.
        axis: 0 for rows, 1 for columns.
        size: pixels of the result along this axis.
    """
    changed: dict[str, Any] = {("scales_w", "scales_h")[axis]: None}
    if named.get("output_size") is not None:
        changed["output_size"] = [size, 2] if axis == 0 else [2, size]
    if named.get("scale_factors") is not None:
        own = named["scale_factors"][axis]
        changed["scale_factors"] = [own, 1.0] if axis == 0 else [1.0, own]
    return {name: value for name, value in changed.items() if name in named}


def resampled(node: Node, x: Planes, steps: list[Any]) -> Operation | None:
    """Return the last step of a function of `RESAMPLES`, after adding the step before it.

    The columns are combined first if the result has more rows than the input, because it takes
    longer for a pixel.

    Args:
        node: its node.
        x: planes of its input.
        steps: the steps so far.

    Returns:
        None if a size or a factor depends on the input.

    Example:
        >>> from torch.fx import Graph
        >>> x = Graph().placeholder("x")
        >>> x.meta["val"] = torch.ones(1, 8, 3, 2)
        >>> node = x.graph.call_function(aten.adaptive_avg_pool2d.default, (x, [2, 2]))
        >>> node.meta["val"] = torch.ones(1, 8, 2, 2)
        >>> resampled(node, Planes(PlaneLayout(3, 2), 8, 3, 2, (8, 3, 2)), []).name
        'rows'
    """
    if (found := _matrices_of(node)) is None:
        return None
    kind = "max_" if node.target is ADAPTIVE_MAX else ""
    axes = {kind + name: matrix for name, matrix in zip(("rows", "columns"), found, strict=True)}
    if len(found[0]) > x.height:
        axes = dict(reversed(axes.items()))
    changing = [item for item in axes.items() if not _is_identity(item[1])]
    step: Operation | None = None
    for name, matrix in changing or [*axes.items()][:1]:
        height, width = (len(matrix), x.width) if name.endswith("rows") else (x.height, len(matrix))
        size = x.channels, height, width
        taps = ResamplingTaps.of(matrix)
        if step is not None:
            steps.append(step)
        out = Planes(PlaneLayout(height, width), *size, size)
        step = Operation(name, (x,), out, index=taps.positions, weight=taps.weights)
        x = out
    return step


def _is_identity(matrix: np.ndarray) -> bool:
    return np.array_equal(matrix, np.eye(len(matrix)))
