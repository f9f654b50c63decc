"""Which steps and functions read which values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch.fx import Node

from .aliases import RESHAPES, SAME
from .layer import Layer
from .planes import Planes
from .steps import Attention, Copy, Recurrence, Sparse, Step, Torch

aten = torch.ops.aten
PERMUTATIONS = (aten.transpose.int, aten.permute.default)
REORDERS = (*RESHAPES, aten.roll.default)


def is_read_by_layers(node: Node, sparse: Collection[object]) -> bool:
    """Return whether only sparse linear layers read a value of tokens, maybe permuted.

    Args:
        node: the value.
        sparse: layers that run sparse.

    Example:
        >>> from torch.fx import Graph
        >>> graph, layer = Graph(), Layer("weight", torch.eye(4), torch.zeros(4))
        >>> x = graph.placeholder("x")
        >>> _ = graph.call_function(layer, (graph.call_function(aten.transpose.int, (x, 0, 1)),))
        >>> is_read_by_layers(x, [layer])
        True
    """

    def reads(user: Node) -> bool:
        layer = user.target
        if layer in PERMUTATIONS:
            return is_read_by_layers(user, sparse)
        return (
            isinstance(layer, Layer) and layer in sparse and layer.linear and user.args[0] is node
        )

    return bool(node.users) and all(map(reads, node.users))


def leads_to_layer(node: Node, sparse: Collection[object]) -> bool:
    """Return whether a sparse linear layer reads a value, maybe after its tokens are reordered.

    Args:
        node: the value.
        sparse: layers that run sparse.

    Example:
        >>> from torch.fx import Graph
        >>> graph, layer = Graph(), Layer("weight", torch.eye(4), torch.zeros(4))
        >>> x = graph.placeholder("x")
        >>> _ = graph.call_function(layer, (graph.call_function(aten.roll.default, (x, [1], [1])),))
        >>> leads_to_layer(x, [layer])
        True
    """
    moves = (*REORDERS, *PERMUTATIONS, *SAME, aten.layer_norm.default)
    for user in node.users:
        if isinstance(user.target, Layer) and user.target in sparse and user.target.linear:
            return True
        if user.target in moves and user.args[0] is node and leads_to_layer(user, sparse):
            return True
    return False


def with_views(
    steps: Sequence[Step], pending: Mapping[Node, Any], outputs: Sequence[Node]
) -> list[Step]:
    """Return steps in which PyTorch computes those views that other steps of PyTorch read.

    Args:
        steps: steps without the functions that return views.
        pending: the nodes of these functions.
        outputs: what the graph returns.

    Example:
        >>> with_views([], {}, [])
        []
    """
    found: list[Step] = []
    done: set[Node] = set()

    def need(node: Node) -> None:
        if node in pending and node not in done:
            done.add(node)
            for n in node.all_input_nodes:
                need(n)
            found.append(Torch(node))

    for step in steps:
        for node in read_by(step):
            need(node)
        found.append(step)
    for node in outputs:
        need(node)
    return found


def read_by(step: Step) -> list[Node]:
    """Return the nodes whose values a step reads as tensors of PyTorch.

    Example:
        >>> from torch.fx import Graph
        >>> graph = Graph()
        >>> node = graph.call_function(torch.relu, (graph.placeholder("x"),))
        >>> read_by(Torch(node))
        [x]
    """
    if isinstance(step, Torch):
        return list(step.node.all_input_nodes)
    if isinstance(step, Attention):
        return [] if step.mask is None else [step.mask]
    if isinstance(step, Recurrence):
        return list(step.states)
    return [step.source] if isinstance(step, Copy) else []


def find_last_uses(
    steps: Sequence[Step], planes: Mapping[Node, Planes], read: AbstractSet[Node]
) -> dict[Planes, int]:
    """Return the number of the last step that uses the memory of planes (`Planes.root`).

    Args:
        steps: all steps.
        planes: planes of the nodes whose values are in planes.
        read: nodes whose values PyTorch reads. Their planes are used until the end, since PyTorch
            may return views of them.

    Example:
        >>> find_last_uses([], {}, set())
        {}
    """
    last_use: dict[Planes, int] = {}
    for i, step in enumerate(steps):
        if isinstance(step, Torch):
            continue
        used: list[Planes | None] = [step.out]
        if isinstance(step, Sparse):
            used += [step.x, step.residual]
        elif isinstance(step, Copy):
            used.append(planes.get(step.source))
        else:
            used += step.x
        last_use |= {p.root: i for p in used if p is not None}
    return last_use | {planes[node].root: len(steps) for node in read & planes.keys()}
