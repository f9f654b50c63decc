"""The steps of a network in order, and what each step reads and writes, for any batch size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from .layer import Layer
from .planes import Planes
from .sizes import pixels_per_sample
from .steps import Copy, Operation, Pointwise, Sparse, Step, Torch

__all__ = ["Copy", "Operation", "Plan", "Pointwise", "Sparse", "Step", "Torch", "can_run_sparse"]


@dataclass
class Plan:
    """The steps of a network in order.

    Attributes:
        graph: the captured graph.
        steps: in order of execution.
        planes: planes of the nodes whose values are in planes.
        last_use: number of the last step that uses the memory of planes (`Planes.root`).
            Activations that PyTorch reads are used until the end, since PyTorch may return views of
            them.

    Example:
        >>> import torch
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> x.meta["val"] = torch.ones(1, 4)
        >>> layer = Layer("weight", torch.eye(4), torch.zeros(4))
        >>> node = graph.call_function(layer, (x,))
        >>> node.meta["val"] = layer(torch.ones(1, 4))
        >>> _ = graph.output(node)
        >>> [type(step).__name__ for step in Plan.build(graph, [layer]).steps]
        ['Copy', 'Sparse']
    """

    graph: Graph
    steps: list[Step] = field(default_factory=list)
    planes: dict[Node, Planes] = field(default_factory=dict)
    last_use: dict[Planes, int] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        graph: Graph,
        sparse: Collection[Layer],
        constants: Mapping[Node, Any] | None = None,
    ) -> Plan:
        """Return the plan of a captured graph.

        Args:
            graph: its layers are nodes whose target is a `Layer`.
            sparse: the layers that run sparse.
            constants: values of the `get_attr` nodes. Without them, the only steps are `Torch`,
                `Copy`, `Sparse` and `Pointwise`.
        """
        from .builder import Builder  # imports this module

        builder = Builder(cls(graph), sparse, constants)
        for node in graph.nodes:
            builder.add(node)
        plan = builder.plan
        _find_last_uses(plan)
        return plan


def _find_last_uses(plan: Plan) -> None:
    last_use, end = plan.last_use, len(plan.steps)
    for i, step in enumerate(plan.steps):
        if isinstance(step, Torch):
            continue
        used: list[Planes | None] = [step.out]
        if isinstance(step, Sparse):
            used += [step.x, step.residual]
        elif isinstance(step, Copy):
            used.append(plan.planes.get(step.source))
        else:
            used += step.x
        for planes in used:
            if planes is not None:
                last_use[planes.root] = i
    for node, planes in plan.planes.items():
        if any(user not in plan.planes for user in node.users):
            last_use[planes.root] = end


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
