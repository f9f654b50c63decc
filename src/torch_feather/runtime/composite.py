"""Functions that models write out as several: GELU with tanh, as in GPT-2 and older BERTs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
CUBIC = 0.044715  # coefficient of x³ in GELU with tanh


def replace_composites(graph: Graph) -> None:
    """Replace x/2 · (1 + tanh(sqrt(2/π) · (x + 0.044715 · x³))) by GELU.

    Args:
        graph: exported; it is modified.

    Example:
        >>> def gelu(x):
        ...     inner = (2 / math.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))
        ...     return 0.5 * x * (1.0 + torch.tanh(inner))
        >>> class Gelu(torch.nn.Module):
        ...     forward = staticmethod(gelu)
        >>> graph = torch.export.export(Gelu(), (torch.ones(3),)).module().graph
        >>> replace_composites(graph)
        >>> [str(n.target) for n in graph.nodes if n.op == "call_function"]
        ['aten.gelu.default']
    """
    for node in list(graph.nodes):
        x = _gelu_argument(node)
        if x is None:
            continue
        with graph.inserting_before(node):
            gelu = graph.call_function(aten.gelu.default, (x,), {"approximate": "tanh"})
        gelu.meta = dict(node.meta)
        node.replace_all_uses_with(gelu)
        _erase(graph, node, x)


def _erase(graph: Graph, node: Node, argument: Node) -> None:
    """Remove a node, and what only it used, down to the argument of the function."""
    before = [n for n in node.all_input_nodes if n is not argument]
    graph.erase_node(node)
    for n in before:
        if not n.users:
            _erase(graph, n, argument)


def _gelu_argument(node: Node) -> Node | None:
    """Return x if a node computes GELU of it by tanh; None if it computes something else."""
    if node.target is not aten.mul.Tensor or not all(isinstance(a, Node) for a in node.args):
        return None
    for half, other in (node.args, node.args[::-1]):
        x = _operand(half, aten.mul.Tensor, 0.5)
        tanh = _operand(other, aten.add.Tensor, 1.0)
        if x is None or tanh is None or tanh.target is not aten.tanh.default:
            continue
        inner: Any = _operand(tanh.args[0], aten.mul.Tensor, math.sqrt(2 / math.pi))
        if inner is None or inner.target is not aten.add.Tensor or inner.kwargs:
            continue
        for a, b in (inner.args, inner.args[::-1]):
            if a is x and (cube := _operand(b, aten.mul.Tensor, CUBIC)) is not None:
                is_cube = cube.target is aten.pow.Tensor_Scalar and tuple(cube.args) == (x, 3)
                return x if is_cube else None
    return None


def _operand(node: Any, target: Any, number: float) -> Node | None:
    """Return the other operand if a node adds a number, or multiplies by it."""
    if not isinstance(node, Node) or node.target is not target or node.kwargs:
        return None
    for a, b in (node.args, node.args[::-1]):
        if (
            isinstance(a, Node)
            and isinstance(b, int | float)
            and math.isclose(b, number, rel_tol=1e-6)
        ):
            return a
    return None
