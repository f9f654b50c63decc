"""Fusion: layers with constant weights, and the operations after them, become one node each.

A batch norm, a constant factor per channel, a residual addition and a clamp are fused into the
convolution or linear layer before them. The target of the new node is a `Layer`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .activations import activation_of, bounds_of
from .composite import replace_border_pooling, replace_composites
from .constants import attributes, constants_of
from .errors import CaptureError
from .layer import Layer
from .lifting import lift
from .one_sample import is_whole
from .readers import BATCH_NORM, Constants, cropped, folded, input_of, padded, read_layer
from .recurrent import fuse_recurrent
from .shuffle import replace_shuffles
from .written_attention import replace_attention

aten = torch.ops.aten
# Functions that read memory in its order, which differs in planes.
READS_MEMORY = (
    aten.as_strided.default,
    aten.as_strided_copy.default,
    aten.as_strided_scatter.default,
)
# Functions that depend on the strides of their input.
NEEDS_CONTIGUOUS = (*READS_MEMORY, aten.view_as_complex.default, aten.view.dtype)
CONVERSIONS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other)


def fuse(module: GraphModule, activations: bool = True) -> GraphModule:
    """Replace layers with constant weights, and the operations after them, by `Layer` nodes.

    Args:
        module: an exported model, which is modified.
        activations: whether to fuse smooth activation functions into the layers before them, and to
            replace average pooling, LSTM, GRU and channel shuffles by layers, and GELU that is
            written out by one function.

    Returns:
        The module.

    Raises:
        CaptureError: the model reads memory in an order that planes do not have.

    Example:
        >>> graph = Graph()
        >>> _ = graph.output(graph.placeholder("x"))
        >>> len(fuse(GraphModule(torch.nn.Module(), graph)).graph.nodes)
        2
    """
    for part in graphs_of(module):
        _normalize(part.graph)
        if activations:
            replace_composites(part.graph)
        if part is not module:  # the module itself is recompiled at the end
            part.recompile()
    lift(module.graph)
    if activations:
        replace_shuffles(module.graph)
        replace_border_pooling(module)
    graph = module.graph
    constants = constants_of(graph, attributes(module))
    if activations:
        replace_attention(graph, constants)
        fuse_recurrent(graph, constants)
    alive, uses = set(graph.nodes), Counter[str]()
    for node in list(graph.nodes):
        if node in alive and (layer := read_layer(node, constants, activations)):
            uses[layer.name] += 1
            if uses[layer.name] > 1:  # shared weights, maybe at another input size
                layer = replace(layer, name=f"{layer.name}@{uses[layer.name]}")
            _fuse_layer(graph, node, layer, constants, activations)
            alive = set(graph.nodes)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def reads_memory(module: GraphModule) -> bool:
    """Return whether a model reads memory in its order (`torch.as_strided`).

    Example:
        >>> graph = Graph()
        >>> _ = graph.call_function(aten.as_strided.default, (graph.placeholder("x"), [2], [3]))
        >>> reads_memory(GraphModule(torch.nn.Module(), graph))
        True
    """
    return any(n.target in READS_MEMORY for part in graphs_of(module) for n in part.graph.nodes)


def graphs_of(module: GraphModule) -> list[GraphModule]:
    """Return the graph of a model and those of its branches (torch.cond).

    Example:
        >>> graphs_of(GraphModule(torch.nn.Module(), Graph()))
        [GraphModule()]
    """
    return [part for part in module.modules() if isinstance(part, GraphModule)]


def _normalize(graph: Graph) -> None:
    """Remove guards and what changes nothing, and adapt functions that depend on strides."""
    for node in list(graph.nodes):
        if node.op == "call_module" and node.name.startswith("_guards"):
            graph.erase_node(node)  # `Captured.accepts` evaluates them
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # the types of inputs are checked
        elif _returns_argument(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.pad.default and not any(node.args[1]):
            node.target, node.args, node.kwargs = aten.clone.default, node.args[:1], {}
        elif node.op == "call_function" and node.target is aten.view.default:
            node.target = aten.reshape.default  # planes have strides that view may not support
        elif node.target in NEEDS_CONTIGUOUS:
            _make_contiguous(graph, node)


def _returns_argument(node: Node) -> bool:
    """Return whether a function returns its first argument, such as a conversion to its type."""
    if node.target is aten.dropout.default:
        return not node.args[2]
    if node.target not in CONVERSIONS:
        return is_whole(node)
    copies = {*node.args, *node.kwargs.items()} & {True, ("copy", True)}
    values = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    formats = [*node.args, *node.kwargs.values()]
    is_same = values[0].dtype == values[1].dtype and values[0].device == values[1].device
    return is_same and not copies and not any(isinstance(f, torch.memory_format) for f in formats)


def _make_contiguous(graph: Graph, node: Node) -> None:
    x = node.args[0]
    assert isinstance(x, Node)
    value = x.meta["val"]
    if node.target in READS_MEMORY and (value.storage_offset() or not value.is_contiguous()):
        raise CaptureError(
            f"The model calls as_strided on a tensor of strides {tuple(value.stride())}, which is "
            "not contiguous, or a part of another one. A compiled network stores activations in "
            "another order. Call it on x.contiguous() or x.clone(), or use other functions."
        )
    with graph.inserting_before(node):
        clone = graph.call_function(
            aten.clone.default, (x,), {"memory_format": torch.contiguous_format}
        )
    clone.meta.update(val=x.meta["val"], is_needed=True)
    node.replace_input_with(x, clone)


# Operations after a layer


def _fuse_layer(
    graph: Graph, node: Node, layer: Layer, constants: Constants, activations: bool
) -> None:
    """Replace a node, and the operations after it that can be fused, by `layer`."""
    residual: Node | None = None
    chain = [node, *node.users] if node.target is BATCH_NORM else [node]
    while (user := _only_user(chain[-1])) is not None:
        is_sum = layer.combine == "fma" and residual is None
        linear_so_far, adds = is_sum and not layer.pools, is_sum and layer.adds
        if linear_so_far and (factor := _factor(user, chain[-1], layer, constants)) is not None:
            layer = layer.scaled(factor)
        elif is_sum and (part := cropped(user, chain[-1], layer)) is not None:
            layer = part
        elif linear_so_far and (normed := folded(user, layer, constants)) is not None:
            layer = normed
            if user.target is BATCH_NORM:
                chain.append(user)
                (user,) = user.users
        elif adds and (other := _addend(user, chain[-1])) is not None:
            residual = other
        else:
            if (bounds := bounds_of(user)) is not None:
                layer = replace(layer, low=bounds[0], high=bounds[1])
                chain.append(user)
            elif activations and layer.combine == "fma" and (name := activation_of(user)):
                layer = replace(layer, activation=name)
                chain.append(user)
            break
        chain.append(user)
    with graph.inserting_before(chain[-1]):
        x, layer = padded(input_of(node), layer)
        inputs = (x,) if residual is None else (x, residual)
        fused = graph.call_function(layer, inputs)
    fused.meta["val"] = chain[-1].meta["val"]
    chain[-1].replace_all_uses_with(fused)
    for replaced in reversed(chain):
        graph.erase_node(replaced)


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _factor(user: Node, last: Node, layer: Layer, constants: Constants) -> Tensor | None:
    """Return the constant factors per channel by which `user` multiplies the result."""
    if user.target is not aten.mul.Tensor or last not in user.args:
        return None
    other = user.args[1] if user.args[0] is last else user.args[0]
    factor = constants.get(other) if isinstance(other, Node) else None
    if factor is None:
        return None
    out = layer.channels[1]
    shape = (out, *[1] * (layer.weight.dim() - 2))
    matches = factor.numel() == out and tuple(factor.shape[-len(shape) :]) == shape
    return factor.reshape(-1) if matches and _is_alike(user, last) else None


def _addend(user: Node, last: Node) -> Node | None:
    """Return the value of the same shape that `user` adds to the result."""
    if user.target is not aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return None
    a, b = user.args
    if not (isinstance(a, Node) and isinstance(b, Node)) or a is b:
        return None
    other = b if a is last else a
    return other if _is_alike(other, last) else None


def _is_alike(a: Node, b: Node) -> bool:
    """Return whether two values have the same shape and type."""
    return _shape(a) == _shape(b) and a.meta["val"].dtype == b.meta["val"].dtype


def _shape(node: Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None
