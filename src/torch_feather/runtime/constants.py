"""Values of a graph that do not depend on its input, such as masks of attention."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
# Functions that create a tensor from sizes. Of an argument they use the size, or the type alone.
CREATES = {
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default),
    *(aten.zeros.default, aten.ones.default, aten.scalar_tensor.default, aten.eye.default),
}
CREATES_LIKE = {*(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)}
CREATES_NEW = {*(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)}


def attributes(module: GraphModule) -> dict[Node, Any]:
    """Return the values of the `get_attr` nodes: weights, buffers, and branches of torch.cond.

    Example:
        >>> module = torch.nn.Linear(4, 2)
        >>> graph = Graph()
        >>> bias = graph.get_attr("bias")
        >>> attributes(GraphModule(module, graph))[bias].shape
        torch.Size([2])
    """
    found: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(module)
            found[node] = value.detach() if isinstance(value, Tensor) else value
    return found


def constants_of(graph: Graph, known: Mapping[Node, Any]) -> dict[Node, Any]:
    """Return the tensors of a graph that do not depend on its input, also lists of tensors.

    Args:
        graph: the graph.
        known: values of its `get_attr` nodes.

    Example:
        >>> graph = Graph()
        >>> x = graph.call_function(aten.arange.default, (3,))
        >>> x.meta["val"] = torch.arange(3)
        >>> constants_of(graph, {})[x]
        tensor([0, 1, 2])
    """
    found = {n: value for n, value in known.items() if isinstance(value, Tensor)}
    for node in graph.nodes:
        if node.op == "call_function" and _is_constant(node, found):
            args, kwargs = map_arg((node.args, node.kwargs), _given(node, found))
            found[node] = node.target(*args, **kwargs)
    return found


def constants_of_module(module: GraphModule) -> dict[Node, Any]:
    """Return the values of a graph that do not depend on its input, see `with_results`.

    Example:
        >>> constants_of_module(GraphModule(torch.nn.Module(), Graph()))
        {}
    """
    return with_results(module.graph, attributes(module))


def with_results(graph: Graph, known: Mapping[Node, Any]) -> dict[Node, Any]:
    """Return known values and the tensors that are computed from them.

    Args:
        graph: the graph.
        known: values of its `get_attr` nodes.

    Returns:
        Values by node; None for those that only constants are computed from.

    Example:
        >>> graph = Graph()
        >>> x = graph.call_function(aten.arange.default, (3,))
        >>> x.meta["val"] = torch.arange(3)
        >>> with_results(graph, {})  # nothing reads it
        {arange_default: None}
    """
    found = constants_of(graph, known)
    for node, value in list(found.items()):
        if not isinstance(value, Tensor) and not all(user in found for user in node.users):
            del found[node]
    read = {node for node in found if any(user not in found for user in node.users)}
    return {node: value if node in read else None for node, value in found.items()} | dict(known)


def _is_constant(node: Node, known: Mapping[Node, Any]) -> bool:
    if not _are_tensors(node.meta.get("val")):
        return False
    if node.target in CREATES_LIKE | CREATES_NEW:
        is_static = node.target in CREATES_NEW or _is_static(node.all_input_nodes[0])
        return len(node.all_input_nodes) == 1 and is_static
    if not node.all_input_nodes:
        return node.target in CREATES
    is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    is_function = isinstance(node.target, OpOverload) or node.target is operator.getitem
    return is_function and not is_random and all(n in known for n in node.all_input_nodes)


def _given(node: Node, known: Mapping[Node, Any]) -> Callable[[Node], Any]:
    """Return the function of the values of the arguments of a constant."""

    def given(argument: Node) -> Any:
        if argument in known:
            return known[argument]
        value = argument.meta["val"]
        one = torch.zeros((), dtype=value.dtype, device="cpu")
        return one if node.target in CREATES_NEW else one.expand(value.shape)

    return given


def _is_static(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and all(isinstance(n, int) for n in value.shape)


def _are_tensors(value: Any) -> bool:
    """Return whether a value is a tensor, or several, such as parts of a weight."""
    if isinstance(value, tuple | list):
        return all(isinstance(v, Tensor) for v in value)
    return isinstance(value, Tensor)
