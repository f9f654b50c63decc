"""Dimensions of a tensor as strides that functions such as `permute` and `view` change.

A dimension may consist of several parts with a size and a stride each: the product of samples and
heads, for example. So any regrouping of dimensions is a view, also one for which PyTorch copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from .aliases import RESHAPES, SAME, SPLITS

aten = torch.ops.aten
Part = tuple[int, int]  # size and stride
CHANNEL = 1 << 36  # distance between channels, which no distance between tokens reaches


class Dimensions(NamedTuple):
    """The place of each element of a tensor.

    Attributes:
        offset: of the first element.
        parts: of each dimension, sizes and strides.

    Example:
        >>> x = Dimensions.strided((2, 3, 4), (12, 4, 1))
        >>> x.reshaped((6, 4)).shape, x.reshaped((2, 12)).merged(1)
        ((6, 4), [(12, 1)])
    """

    offset: int
    parts: tuple[tuple[Part, ...], ...]

    @classmethod
    def strided(cls, sizes: Sequence[int], strides: Sequence[int]) -> Dimensions:
        """Return the dimensions of a tensor without offset."""
        return cls(0, tuple((part,) for part in zip(sizes, strides, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return tuple(math.prod(size for size, _ in parts) for parts in self.parts)

    def merged(self, *dims: int) -> list[Part]:
        """Return the parts of some dimensions together, as few as possible."""
        found: list[Part] = []
        for size, stride in (part for d in dims for part in self.parts[d]):
            if size == 1:
                continue
            if found and found[-1][1] == size * stride:
                found[-1] = found[-1][0] * size, stride
            else:
                found.append((size, stride))
        return found

    def reshaped(self, shape: Sequence[int]) -> Dimensions | None:
        """Return other dimensions of the same elements; None if they divide a part unevenly."""
        rest = [part for parts in self.parts for part in parts if part[0] != 1][::-1]
        dims = []
        for need in shape:
            parts: list[Part] = []
            while need > 1:
                if not rest:
                    return None
                size, stride = rest.pop()
                if size > need and size % need == 0:  # the next dimensions take what is left
                    rest.append((size // need, stride))
                    size, stride = need, stride * (size // need)
                if need % size:
                    return None
                need //= size
                parts.append((size, stride))
            dims.append(tuple(parts))
        return None if rest else Dimensions(self.offset, tuple(dims))

    def selected(self, dim: int, index: int) -> Dimensions | None:
        """Return the elements at an index of a dimension, without this dimension."""
        part = self._only(dim)
        if part is None:
            return None
        rest = (*self.parts[:dim], *self.parts[dim + 1 :])
        return Dimensions(self.offset + index % part[0] * part[1], rest)

    def sliced(self, dim: int, first: int, count: int) -> Dimensions | None:
        """Return some successive elements of a dimension."""
        part = self._only(dim)
        if part is None:
            return None
        parts = (*self.parts[:dim], ((count, part[1]),), *self.parts[dim + 1 :])
        return Dimensions(self.offset + first * part[1], parts)

    def _only(self, dim: int) -> Part | None:
        """Return the size and stride of a dimension; None if it has several parts."""
        found = self.merged(dim)
        return None if len(found) > 1 else found[0] if found else (1, 0)


def applied(node: Node, x: Dimensions, shape: Sequence[int] | None) -> Any:
    """Return the dimensions of the result of a function, or a list of them if it returns several.

    Args:
        node: the function.
        x: dimensions of its first argument.
        shape: of its result; None if it returns several.

    Returns:
        None if the function may copy, or is another one.

    Example:
        >>> from torch.fx import Graph
        >>> graph = Graph()
        >>> node = graph.call_function(aten.transpose.int, (graph.placeholder("x"), 0, 1))
        >>> applied(node, Dimensions.strided((2, 3), (3, 1)), (3, 2)).parts
        (((3, 1),), ((2, 3),))
    """
    target, rank = node.target, len(x.parts)
    if target in SAME:
        return None if node.meta.get("is_needed") else x
    if target in RESHAPES:
        return None if shape is None else x.reshaped(shape)
    args: list[Any] = [*node.args[1:], None, None, None]
    if node.kwargs or len(node.all_input_nodes) != 1:
        return None
    if target is aten.permute.default:
        return Dimensions(x.offset, tuple(x.parts[d] for d in args[0]))
    if target is aten.transpose.int:
        parts = list(x.parts)
        parts[args[0]], parts[args[1]] = parts[args[1]], parts[args[0]]
        return Dimensions(x.offset, tuple(parts))
    if target is aten.unbind.int:
        dim = (args[0] or 0) % rank
        return [x.selected(dim, i) for i in range(x.shape[dim])]
    if target is aten.select.int:
        return x.selected(args[0] % rank, args[1])
    if target is aten.slice.Tensor and args[3] in (None, 1):
        dim = (args[0] or 0) % rank
        first, stop, _ = slice(args[1], args[2]).indices(x.shape[dim])
        return x.sliced(dim, first, stop - first) if stop > first else None
    if target in SPLITS:
        dim, first, found = (args[1] or 0) % rank, 0, []
        for value in node.meta["val"]:
            count = int(value.shape[dim])
            found.append(x.sliced(dim, first, count))
            first += count
        return found
    return None
