"""Sizes of tensors as functions of the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .layer import Layer
from .planes import Size

PROBES = (1, 2, 3, 8, 61)  # batch sizes at which a size is evaluated


def size_of(size: Any, batch: Any) -> Size | None:
    """Return a size as a constant, and a number that is multiplied by the batch size.

    Args:
        size: integer, or symbol of torch.export.
        batch: size or symbol of the batch.

    Returns:
        None if the size is no such sum.

    Example:
        >>> size_of(7, 2)
        (7, 0)
    """
    if isinstance(size, int):
        return size, 0
    if str(size) == str(batch):
        return 0, 1
    if isinstance(batch, int):
        return None
    expression, symbol = size.node.expr, batch.node.expr
    if expression.free_symbols != {symbol}:
        return None
    found = [expression.subs(symbol, n) for n in PROBES]
    if not all(value.is_integer for value in found):
        return None
    slope = int(found[1]) - int(found[0])
    constant = int(found[0]) - slope
    if any(int(v) != constant + slope * n for v, n in zip(found, PROBES, strict=True)):
        return None
    return constant, slope


def sizes_of(sizes: Sequence[Any], batch: Any) -> tuple[Size, ...] | None:
    """Return several sizes; None if one of them is no such sum, see `size_of`.

    Example:
        >>> sizes_of((3, 4), 3)
        ((3, 0), (4, 0))
    """
    found = [size_of(n, batch) for n in sizes]
    return None if None in found else tuple(found)  # type: ignore[arg-type]


def pixels_per_sample(sizes: Sequence[Any], batch: Any) -> int | None:
    """Return the number of tokens per sample.

    Args:
        sizes: all dimensions of the tokens.
        batch: size or symbol of the batch.

    Returns:
        None if the number of tokens is not a multiple of the batch size.

    Example:
        >>> pixels_per_sample((3, 4), 3), pixels_per_sample((5, 4), 3)
        (4, None)
    """
    found = sizes_of(sizes, batch)
    if found is None:
        return None
    probes = (int(batch),) if isinstance(batch, int) else PROBES
    counts = set()
    for n in probes:
        total = 1
        for constant, slope in found:
            total *= constant + slope * n
        counts.add(total / n)
    (count, *others) = counts
    return int(count) if not others and count.is_integer() and count > 0 else None


def are_alike(values: Sequence[Any]) -> bool:
    """Return whether all values are tensors of float32 of one shape.

    Example:
        >>> import torch
        >>> are_alike([torch.ones(2, 3), torch.ones(2, 1)])
        False
    """
    if any(not isinstance(v, Tensor) or v.dtype != torch.float32 for v in values):
        return False
    return len({str(tuple(v.shape)) for v in values}) == 1


def can_run_sparse(node: Node, batch: Any) -> bool:
    """Return whether a layer can run sparse.

    The input and result of a convolution must have the samples of the batch as their first
    dimension, and a known size otherwise. Those of a linear layer must have a constant number of
    tokens per sample.

    Args:
        node: node of the layer.
        batch: size or symbol of the first dimension of the graph's input.

    Example:
        >>> import torch
        >>> from torch.fx import Graph
        >>> node = Graph().placeholder("x")
        >>> node.meta["val"] = torch.ones(3, 4)
        >>> can_run_sparse(node, batch=3), can_run_sparse(node, batch=2)
        (True, False)
    """
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    is_linear = isinstance(node.target, Layer) and node.target.linear
    for v in values:
        if not isinstance(v, Tensor) or v.dim() < 2:
            return False
        if is_linear or v.dim() == 2:
            if not isinstance(v.shape[-1], int) or pixels_per_sample(v.shape[:-1], batch) is None:
                return False
        elif str(v.shape[0]) != str(batch) or not all(
            isinstance(n, int) and n > 0 for n in v.shape[1:]
        ):
            return False
    return True
