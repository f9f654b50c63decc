"""The steps of a network in order, and what each step reads and writes, for any batch size."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .layer import Layer
from .planes import PlaneLayout, Planes, split_size
from .taps import Taps


@dataclass(eq=False)
class Torch:
    """A function of PyTorch, or a dense layer.

    Attributes:
        node: its node in the graph.

    Example:
        >>> Torch(Graph().placeholder("x")).node
        x
    """

    node: Node


@dataclass(eq=False)
class Copy:
    """Copies a value into planes, split into phases.

    Attributes:
        source: node of the value.
        out: planes; the channels of each phase follow those of the phase before.
        size: rows and columns of the source.
        stride: distance of the rows and columns of a phase.
        phases: first row and column of each phase.
        padding_value: value of the padding around images.

    Example:
        >>> out = Planes(PlaneLayout(3, 4), 8, 3, 4, (8, 3, 4))
        >>> Copy(Graph().placeholder("x"), out, size=(3, 4)).phases
        ((0, 0),)
    """

    source: Node
    out: Planes
    size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    phases: tuple[tuple[int, int], ...] = ((0, 0),)
    padding_value: float = 0.0


@dataclass(eq=False)
class Sparse:
    """A sparse layer, from planes to planes.

    Attributes:
        layer: the layer.
        taps: its nonzero weights.
        x: input.
        out: result.
        residual: planes that are added to the result.

    Example:
        >>> layer = Layer("weight", torch.eye(4), torch.zeros(4))
        >>> x, out = (Planes(PlaneLayout(1, 1), 4, 1, 1, (4,), linear=True) for _ in range(2))
        >>> len(Sparse(layer, Taps.from_layer(layer), x, out).taps.values)
        4
    """

    layer: Layer
    taps: Taps
    x: Planes
    out: Planes
    residual: Planes | None = None


@dataclass(eq=False)
class Pointwise:
    """An elementwise function of PyTorch that maps 0 to 0, from planes to planes.

    Attributes:
        node: its node in the graph.
        x: inputs.
        out: result.

    Example:
        >>> planes = Planes(PlaneLayout(3, 4), 8, 3, 4, (8, 3, 4))
        >>> Pointwise(Graph().placeholder("x"), (planes,), planes).out.channels
        8
    """

    node: Node
    x: tuple[Planes, ...]
    out: Planes


Step = Torch | Copy | Sparse | Pointwise

aten = torch.ops.aten
# Elementwise functions that map 0 to 0, so that padding stays 0.
POINTWISE = {
    *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.hardswish.default),
    *(aten.leaky_relu.default, aten.elu.default, aten.mish.default, aten.tanh.default),
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor),
}


@dataclass
class Plan:
    """The steps of a network in order.

    Attributes:
        graph: the captured graph.
        steps: in order of execution.
        planes: planes of the nodes whose values are in planes.
        last_use: number of the last step that uses an activation. Activations that PyTorch reads
            are used until the end, since PyTorch may return views of them.

    Example:
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
    def build(cls, graph: Graph, sparse: Collection[Layer]) -> Plan:
        """Return the plan of a captured graph.

        Args:
            graph: its layers are nodes whose target is a `Layer`.
            sparse: the layers that run sparse.
        """
        builder = _Builder(cls(graph), sparse)
        for node in graph.nodes:
            builder.add(node)
        return builder.finish()


class _Builder:
    """Adds the steps of one node after the other to a plan."""

    def __init__(self, plan: Plan, sparse: Collection[Layer]) -> None:
        self.plan, self.sparse = plan, sparse
        self.copies: dict[Any, Planes] = {}  # planes that were copied, by source and layout

    def add(self, node: Node) -> None:
        """Add the step of a node, and the copies that it needs."""
        if node.target in POINTWISE and (pointwise := self._pointwise(node)):
            self._append(node, pointwise)
        elif isinstance(node.target, Layer) and node.target in self.sparse and self._fits(node):
            self._append(node, self._sparse(node, node.target))
        elif node.op == "call_function":
            self.plan.steps.append(Torch(node))

    def _append(self, node: Node, step: Pointwise | Sparse) -> None:
        self.plan.planes[node] = step.out
        self.plan.steps.append(step)

    def finish(self) -> Plan:
        """Return the plan, with the last use of each activation."""
        _find_last_uses(self.plan)
        return self.plan

    def _sparse(self, node: Node, layer: Layer) -> Sparse:
        taps = Taps.from_layer(layer)
        if layer.stride == (1, 1) and layer.padding_value == 0.0:
            x = self._in_planes(node.args[0], layer.linear)
        else:
            x = self._split(node.args[0], layer, taps)
        residual = self._in_planes(node.args[1], layer.linear) if len(node.args) > 1 else None
        out = _planes(node, layer.linear)
        for other in (x, residual):
            if other is not None:
                out.layout.merge(other.layout)
        for planes in (x, out):
            out.layout.require(planes.height, planes.width, *taps.reach)
        return Sparse(layer, taps, x, out, residual)

    def _in_planes(self, node: Any, linear: bool) -> Planes:
        """Return the planes of a value, copied if it is not in planes yet."""
        planes = self.plan.planes.get(node)
        if planes is not None and planes.linear == linear:
            return planes
        if (node, linear) not in self.copies:
            out = self.copies[node, linear] = _planes(node, linear)
            self.plan.steps.append(Copy(node, out, (out.height, out.width)))
        return self.copies[node, linear]

    def _split(self, node: Any, layer: Layer, taps: Taps) -> Planes:
        """Return the planes of a value, split into the phases that the taps read."""
        key = (node, layer.stride, taps.phases, layer.padding_value)
        if key not in self.copies:
            height, width = _sample_shape(node)[1:]
            ys, xs = zip(*taps.phases, strict=True)
            out = self.copies[key] = Planes(
                PlaneLayout(0, 0),
                layer.channels[0] * len(taps.phases),
                split_size(height, layer.stride[0], ys),
                split_size(width, layer.stride[1], xs),
                (),
            )
            size, padding_value = (height, width), layer.padding_value
            self.plan.steps.append(Copy(node, out, size, layer.stride, taps.phases, padding_value))
        return self.copies[key]

    def _pointwise(self, node: Node) -> Pointwise | None:
        """Return the step of an elementwise function whose inputs are planes of one shape."""
        inputs = [self.plan.planes.get(n) for n in node.all_input_nodes]
        shape = node.meta["val"].shape[1:]
        x = tuple(p for p in inputs if p is not None and p.shape == tuple(shape))
        binary = node.target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)
        if len(x) < len(inputs) or (binary and not all(isinstance(a, Node) for a in node.args)):
            return None
        if len({planes.linear for planes in x}) != 1:
            return None
        out = _planes(node, x[0].linear)
        for planes in x:
            out.layout.merge(planes.layout)
        return Pointwise(node, x, out)

    def _fits(self, node: Node) -> bool:
        """Return whether a layer can read the planes of its inputs.

        A linear layer cannot read planes of images: their rows are not its pixels.
        """
        planes = [self.plan.planes.get(n) for n in node.all_input_nodes]
        return not node.target.linear or all(  # type: ignore[union-attr]
            p is None or p.linear for p in planes
        )


def _find_last_uses(plan: Plan) -> None:
    last_use, end = plan.last_use, len(plan.steps)
    for i, step in enumerate(plan.steps):
        if isinstance(step, Sparse | Pointwise):
            used = (step.x, step.residual) if isinstance(step, Sparse) else step.x
            for planes in (*used, step.out):
                if planes is not None:
                    last_use[planes] = max(i, last_use.get(planes, 0))
        elif isinstance(step, Copy):
            last_use[step.out] = i
            if step.source in plan.planes:
                source = plan.planes[step.source]
                last_use[source] = max(i, last_use[source])
    for node, planes in plan.planes.items():
        if any(user not in plan.planes for user in node.users):
            last_use[planes] = end


def can_run_sparse(node: Node, batch: Any) -> bool:
    """Return whether a layer can run sparse.

    Its input and result must have the samples of the batch as their first dimension, and a known
    size otherwise.

    Args:
        node: node of the layer.
        batch: size or symbol of the first dimension of the graph's input.

    Example:
        >>> node = Graph().placeholder("x")
        >>> node.meta["val"] = torch.ones(3, 4)
        >>> can_run_sparse(node, batch=3), can_run_sparse(node, batch=1)
        (True, False)
    """
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    return all(
        isinstance(v, Tensor)
        and v.dim() >= 2
        and str(v.shape[0]) == str(batch)
        and all(isinstance(n, int) and n > 0 for n in v.shape[1:])
        for v in values
    )


def _sample_shape(node: Node) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape[1:])


def _planes(node: Node, linear: bool) -> Planes:
    shape = _sample_shape(node)
    if not linear:
        channels, height, width = shape
        return Planes(PlaneLayout(height, width), channels, height, width, shape)
    pixels = math.prod(shape[:-1])
    return Planes(PlaneLayout(1, pixels), shape[-1], 1, pixels, shape, linear=True)
