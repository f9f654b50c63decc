"""Functions that are written out as others: GELU with tanh, and average pooling at borders."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

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


def replace_border_pooling(module: GraphModule) -> None:
    """Replace average pooling that does not count padding by pooling that does, times constants.

    The constants are the size of the window over the number of its pixels within the image.

    Args:
        module: exported; it is modified.

    Example:
        >>> model = torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        >>> module = torch.export.export(model, (torch.ones(1, 2, 4, 4),)).module()
        >>> replace_border_pooling(module)
        >>> [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
        ['aten.avg_pool2d.default', 'aten.mul.Tensor']
    """
    graph = module.graph
    for node in list(graph.nodes):
        args: list[Any] = [*node.args, *[None] * 7]
        if node.target is not aten.avg_pool2d.default or node.kwargs or args[5] is not False:
            continue
        x, window, stride, padding = args[:4]
        value = x.meta["val"]
        if args[4] or args[6] or not any(padding or ()) or value.dim() != 4:
            continue
        if value.dtype != torch.float32 or any(not isinstance(n, int) for n in value.shape[2:]):
            continue
        ones = torch.ones(1, 1, *value.shape[2:], dtype=torch.float32, device="cpu")
        factors: Tensor = F.avg_pool2d(ones, window, stride or None, padding).reciprocal()
        name = f"{node.name}_factors"
        module.register_buffer(name, factors)
        with graph.inserting_before(node):
            pooled = graph.call_function(node.target, (x, window, stride, padding))
            constant = graph.get_attr(name)
            product = graph.call_function(aten.mul.Tensor, (pooled, constant))
        pooled.meta, product.meta = dict(node.meta), dict(node.meta)
        constant.meta["val"] = factors
        node.replace_all_uses_with(product)
        graph.erase_node(node)


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
