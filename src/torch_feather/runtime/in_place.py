"""Replacement of in-place functions in an exported graph by functions that return their result.

`torch.export` can do this too (`run_decompositions`), but it traces the model again, which takes
most of the time of a capture, and splits functions such as `hardswish_` into several. The
replacement here covers the usual case: a function writes into a value that nothing else refers to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

aten = torch.ops.aten
# Functions without an alias annotation that may return their input.
MAY_RETURN_INPUT = (
    *(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default),
    *(aten.feature_alpha_dropout.default, aten.reshape_as.default, aten.type_as.default),
)


def without_writes(graph: Graph) -> bool:
    """Replace the functions of a graph that write into their arguments.

    Args:
        graph: exported, without its decomposition. It is modified; if the result is False, it may
            be modified partly.

    Returns:
        Whether the graph has no writes now. If False, use `run_decompositions`.

    Example:
        >>> class Relu(torch.nn.Module):
        ...     def forward(self, x):
        ...         return (x + 1).relu_() * 2
        >>> module = torch.export.export(Relu(), (torch.ones(2, 3),)).module()
        >>> without_writes(module.graph)
        True
        >>> [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
        ['aten.add.Tensor', 'aten.relu.default', 'aten.mul.Tensor']
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if not isinstance(node.target, OpOverload):
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                return False
            continue
        if _writes_statistics(node) or (_writes(node.target) and not _replace(graph, node)):
            return False
    return True


def may_write_into_input(graph: Graph) -> bool:
    """Return whether a function of a graph may write into an input, or into a view of one.

    Example:
        >>> program = torch.export.export(torch.nn.ReLU(inplace=True), (torch.ones(2, 3),))
        >>> may_write_into_input(program.graph)
        True
    """
    views = {node for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        if node.op != "call_function" or views.isdisjoint(node.all_input_nodes):
            continue
        if not isinstance(node.target, OpOverload):
            return True
        arguments = zip(node.target._schema.arguments, node.args, strict=False)
        if any(a.alias_info and a.alias_info.is_write and x in views for a, x in arguments):
            return True
        if _writes(node.target) and node.kwargs:
            return True
        if _aliases(node):
            views.add(node)
    return False


def _writes(target: OpOverload) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments)


def _aliases(node: Node) -> bool:
    """Return whether the result of a function may share memory with its arguments."""
    target = node.target
    if not isinstance(target, OpOverload) or target in MAY_RETURN_INPUT:
        return True
    return any(r.alias_info is not None for r in target._schema.returns)


def _writes_statistics(node: Node) -> bool:
    """Return whether a norm updates its running statistics, which its schema does not say."""
    if node.target in (aten.batch_norm.default, aten.instance_norm.default):
        return bool(node.args[5]) and node.args[3] is not None
    return False


def _replace(graph: Graph, node: Node) -> bool:
    """Replace one function that writes into its first argument, if nothing else refers to it."""
    target: Any = node.target
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten" or not name.endswith("_") or name.endswith("__") or not node.args:
        return False
    written = [a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments]
    x = node.args[0]
    if not written[0] or any(written[1:]) or not isinstance(x, Node) or x.op != "call_function":
        return False
    if any(_aliases(user) for user in x.users if user is not node) or not _is_only_view(x):
        return False
    packet = getattr(aten, name[:-1], None)
    function = getattr(packet, target._overloadname, None)
    if function is None or _writes(function) or not _same_types(node, x):
        return False
    with graph.inserting_before(node):
        result = graph.call_function(function, node.args, dict(node.kwargs))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    x.replace_all_uses_with(result, delete_user_cb=_follows(result))
    return True


def _is_only_view(x: Node) -> bool:
    """Return whether a value is no view, or the only use of what it is a view of."""
    while _aliases(x):
        if len(x.all_input_nodes) != 1:
            return False
        (x,) = x.all_input_nodes
        if x.op != "call_function" or len(x.users) != 1:
            return False
    return True


def _same_types(node: Node, x: Node) -> bool:
    """Return whether the function cannot promote the type of its first argument."""
    values = [n.meta.get("val") for n in (x, *node.all_input_nodes)]
    tensors = [v for v in values if isinstance(v, Tensor)]
    return tensors[0].is_floating_point() and len({t.dtype for t in tensors}) == 1


def _follows(result: Node) -> Any:
    """Return a test whether a node comes after `result` in its graph."""
    later = set()
    node = result.next
    while node.op != "root":
        later.add(node)
        node = node.next
    return later.__contains__
