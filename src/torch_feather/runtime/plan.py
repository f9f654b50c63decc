"""Which step comes after which, and what each reads and writes; for any batch size."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .layer import Layer
from .planes import Grid, Planes, Taps, split_size


@dataclass(eq=False)
class Torch:
    """A function of PyTorch, or a dense layer."""

    node: Node


@dataclass(eq=False)
class Copy:
    """Bring what `source` holds into planes, split by stride: out gets phase after phase.

    Attributes:
        size: rows and columns of the source.
        outside: what lies around the images.
    """

    source: Node
    out: Planes
    size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    phases: tuple[tuple[int, int], ...] = ((0, 0),)
    outside: float = 0.0


@dataclass(eq=False)
class Sparse:
    """A sparse layer, from planes to planes."""

    layer: Layer
    taps: Taps
    x: Planes
    out: Planes
    residual: Planes | None = None


@dataclass(eq=False)
class Pointwise:
    """A function of PyTorch of each pixel by itself, which leaves 0 as it is."""

    node: Node
    x: tuple[Planes, ...]
    out: Planes


Step = Torch | Copy | Sparse | Pointwise

aten = torch.ops.aten
POINTWISE = {
    *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.hardswish.default),
    *(aten.leaky_relu.default, aten.elu.default, aten.mish.default, aten.tanh.default),
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor),
}


@dataclass
class Plan:
    """The steps in order.

    Attributes:
        planes: of the nodes whose values are planes.
        last: the last step that uses an activation, by planes; what PyTorch looks at lives until
            the end, since views of it may.
    """

    graph: Graph
    steps: list[Step] = field(default_factory=list)
    planes: dict[Node, Planes] = field(default_factory=dict)
    last: dict[Planes, int] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, sparse: Collection[Layer]) -> Plan:
        """The plan of a captured graph in which the layers `sparse` run as such."""
        plan = cls(graph)
        copies: dict[Any, Planes] = {}

        def planes_of(node: Node, linear: bool) -> Planes:
            """Those of a node's value, brought there if need be."""
            if node in plan.planes and plan.planes[node].linear == linear:
                return plan.planes[node]
            if (node, linear) not in copies:
                out = copies[node, linear] = _planes(node, linear)
                plan.steps.append(Copy(node, out, (out.height, out.width)))
            return copies[node, linear]

        def split(node: Node, layer: Layer, taps: Taps) -> Planes:
            key = (node, layer.stride, taps.phases, layer.outside)
            if key not in copies:
                height, width = _sample(node)[1:]
                ys, xs = zip(*taps.phases, strict=True)
                copies[key] = Planes(
                    Grid(0, 0),
                    layer.channels[0] * len(taps.phases),
                    split_size(height, layer.stride[0], ys),
                    split_size(width, layer.stride[1], xs),
                    (),
                )
                size, outside = (height, width), layer.outside
                plan.steps.append(Copy(node, copies[key], size, layer.stride, taps.phases, outside))
            return copies[key]

        for node in graph.nodes:
            layer = node.target
            if node.target in POINTWISE and (pointwise := plan._pointwise(node)):
                plan.planes[node] = pointwise.out
                plan.steps.append(pointwise)
                continue
            if not (isinstance(layer, Layer) and layer in sparse) or plan._mixes(node):
                if node.op == "call_function":
                    plan.steps.append(Torch(node))
                continue
            taps = Taps.of(layer)
            if layer.stride == (1, 1) and layer.outside == 0.0:
                x = planes_of(node.args[0], layer.linear)
            else:
                x = split(node.args[0], layer, taps)
            residual = planes_of(node.args[1], layer.linear) if len(node.args) > 1 else None
            out = _planes(node, layer.linear)
            for other in (x, residual):
                if other is not None:
                    out.grid.join(other.grid)
            for one in (x, out):
                out.grid.require(one.height, one.width, *taps.reach)
            plan.planes[node] = out
            plan.steps.append(Sparse(layer, taps, x, out, residual))
        plan._live()
        return plan

    def _pointwise(self, node: Node) -> Pointwise | None:
        """The step of such a function, if all that it takes are planes of one shape."""
        inputs = [self.planes.get(n) for n in node.all_input_nodes]
        shape = node.meta["val"].shape[1:]
        x = tuple(p for p in inputs if p is not None and p.shape == tuple(shape))
        scalars = node.target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)
        if len(x) < len(inputs) or (scalars and not all(isinstance(a, Node) for a in node.args)):
            return None
        if len({planes.linear for planes in x}) != 1:
            return None
        out = _planes(node, x[0].linear)
        for planes in x:
            out.grid.join(planes.grid)
        return Pointwise(node, x, out)

    def _mixes(self, node: Node) -> bool:
        """Whether a linear layer is to take planes as columns: their rows are not its pixels."""
        return node.target.linear and any(  # type: ignore[union-attr]
            n in self.planes and not self.planes[n].linear for n in node.all_input_nodes
        )

    def _live(self) -> None:
        end = len(self.steps)
        for i, step in enumerate(self.steps):
            if isinstance(step, Sparse | Pointwise):
                used = (step.x, step.residual) if isinstance(step, Sparse) else step.x
                for planes in (*used, step.out):
                    if planes is not None:
                        self.last[planes] = max(i, self.last.get(planes, 0))
            elif isinstance(step, Copy):
                self.last[step.out] = i
                if step.source in self.planes:
                    source = self.planes[step.source]
                    self.last[source] = max(i, self.last[source])
        for node, planes in self.planes.items():
            for user in node.users:
                if user not in self.planes:
                    self.last[planes] = end


def suits(node: Node, batch: Any) -> bool:
    """Whether a layer can run sparse: samples of a known size, one after another.

    Args:
        node: of a layer.
        batch: the size or symbol that the graph's input has as its first dimension.
    """
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    return all(
        isinstance(v, Tensor)
        and v.dim() >= 2
        and str(v.shape[0]) == str(batch)
        and all(isinstance(n, int) and n > 0 for n in v.shape[1:])
        for v in values
    )


def _sample(node: Node) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape[1:])


def _planes(node: Node, linear: bool) -> Planes:
    shape = _sample(node)
    if not linear:
        channels, height, width = shape
        return Planes(Grid(height, width), channels, height, width, shape)
    pixels = 1
    for n in shape[:-1]:
        pixels *= n
    return Planes(Grid(1, pixels), shape[-1], 1, pixels, shape, linear=True)
