"""Values that are in the same planes as another value: views, and some of its channels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .planes import Planes
from .sizes import sizes_of

aten = torch.ops.aten
SAME = (
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default),
    *(aten.lift_fresh_copy.default,),
)
RESHAPES = (
    *(aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.squeeze.dims),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.unflatten.int, aten._unsafe_view.default),
)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def alias_of(node: Node, x: Planes, batch: Any) -> Planes | None:
    """Return the planes of a function that moves no value, given those of its argument.

    Args:
        node: the function.
        x: planes of its first argument.
        batch: size or symbol of the batch.

    Example:
        >>> from torch.fx import Graph
        >>> from torch_feather.runtime.planes import PlaneLayout
        >>> graph, x = Graph(), Planes(PlaneLayout(3, 4), 8, 3, 4, (8, 3, 4))
        >>> node = graph.call_function(
        ...     aten.permute.default, (graph.placeholder("x"), [0, 2, 3, 1])
        ... )
        >>> alias_of(node, x, batch=1).linear
        True
    """
    if node.target in SAME and not node.meta.get("is_needed"):
        return replace(x, base=x, first=0)
    if node.target is aten.permute.default and x.tokens is None:
        order = [d % 4 for d in node.args[1]]  # type: ignore[union-attr, operator]
        c, h, w = x.channels, x.height, x.width
        if not x.linear and order == [0, 2, 3, 1]:
            return replace(x, shape=(h, w, c), linear=True, base=x, first=0)
        if x.linear and order == [0, 3, 1, 2]:
            return replace(x, shape=(c, h, w), linear=False, base=x, first=0)
        return None
    if node.target in RESHAPES:
        return _reshaped(node, x, batch)
    if node.target is aten.slice.Tensor:
        return _slice(node, x)
    return None


def _reshaped(node: Node, x: Planes, batch: Any) -> Planes | None:
    value = node.meta["val"]
    shape = value.shape if isinstance(value, Tensor) else ()
    if len(shape) < 2:
        return None
    one_pixel = x.height == x.width == 1
    if one_pixel and len(shape) == 4 and str(shape[0]) == str(batch):
        if shape[1:] == (x.channels, 1, 1):
            return replace(x, shape=(x.channels, 1, 1), linear=False, tokens=None, base=x, first=0)
        return None
    if not isinstance(shape[-1], int) or shape[-1] != x.channels:
        return None
    if x.tokens is None and not (one_pixel and len(shape) == 2 and x.layout.fix()):
        return None
    tokens = sizes_of(shape[:-1], batch)
    if tokens is None:
        return None
    sample = (x.channels,) if len(shape) == 2 else (x.width, x.channels)
    return replace(x, shape=sample, linear=True, tokens=tokens, base=x, first=0)


def _dim(node: Node, dim: Any, x: Planes) -> bool:
    """Return whether a dimension of the argument of a node is that of the channels."""
    count = len(x.tokens) + 1 if x.tokens is not None else 4
    return bool(dim % count == (count - 1 if x.linear else 1))


def _slice(node: Node, x: Planes) -> Planes | None:
    args: list[Any] = list(node.args) + [None] * 5
    dim, start, end, step = args[1] or 0, args[2] or 0, args[3], args[4]
    if step not in (None, 1) or not isinstance(start, int):
        return None
    if start == 0 and (end is None or (isinstance(end, int) and end > 2**62)):  # all of it
        return replace(x, base=x, first=0)
    if not _dim(node, dim, x):
        return None
    if not (end is None or isinstance(end, int)):
        return None
    first, stop, _ = slice(start, end).indices(x.channels)
    return x.channels_from(first, stop - first) if stop > first else None


def channels_of(node: Node, x: Planes) -> list[Planes] | None:
    """Return the planes of the parts into which a node splits the channels of its argument.

    Example:
        >>> from torch.fx import Graph
        >>> from torch_feather.runtime.planes import PlaneLayout
        >>> graph, x = Graph(), Planes(PlaneLayout(3, 4), 8, 3, 4, (8, 3, 4))
        >>> node = graph.call_function(aten.split.Tensor, (graph.placeholder("x"), 3, 1))
        >>> node.meta["val"] = torch.ones(1, 8, 3, 4).split(3, 1)
        >>> [part.channels for part in channels_of(node, x)]
        [3, 3, 2]
    """
    if node.target not in SPLITS or node.kwargs:
        return None
    dim = node.args[2] if len(node.args) > 2 else 0
    if not _dim(node, dim, x) or any(user.op == "output" for user in node.users):
        return None
    if any(not isinstance(u.args[-1], int) or u.args[0] is not node for u in node.users):
        return None
    parts, first = [], 0
    for value in node.meta["val"]:
        count = int(value.shape[-1] if x.linear else value.shape[1])
        parts.append(x.channels_from(first, count))
        first += count
    return parts
