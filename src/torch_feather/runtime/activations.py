"""Activation functions that are fused into layers: smooth functions and clamps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten


def activation_of(node: Node) -> str | None:
    """Return the name of the activation function that a node computes, see `kernels.ACTIVATIONS`.

    Example:
        >>> from torch.fx import Graph
        >>> graph = Graph()
        >>> activation_of(graph.call_function(aten.silu.default, (graph.placeholder("x"),)))
        'silu'
    """
    if node.target is aten.gelu.default:
        kind = str(node.kwargs.get("approximate", "none"))
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(kind)
    return SMOOTH.get(node.target)


SMOOTH: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.sigmoid.default: "sigmoid",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.tanh.default: "tanh",
}


def bounds_of(node: Node) -> tuple[float, float] | None:
    """Return the bounds to which a node clamps its argument; None if it does something else.

    Example:
        >>> from torch.fx import Graph
        >>> bounds_of(Graph().call_function(aten.relu.default, ()))
        (0.0, inf)
    """
    if node.target is aten.relu.default:
        return 0.0, math.inf
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target in (aten.hardtanh.default, aten.clamp.default):
        bounds = [-1.0, 1.0] if node.target is aten.hardtanh.default else [-math.inf, math.inf]
        for i, given in enumerate(node.args[1:3]):
            if isinstance(given, Node):
                return None
            if given is not None:
                bounds[i] = float(given)  # type: ignore[arg-type]
        return None if node.kwargs else (bounds[0], bounds[1])
    return None
