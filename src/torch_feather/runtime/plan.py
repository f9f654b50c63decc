"""The steps of a network in order, and what each step reads and writes, for any batch size."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .activations import activation_of
from .aliases import alias_of, channels_of
from .concatenation import Concatenation
from .layer import Layer
from .planes import PlaneLayout, Planes, alike
from .reading import PERMUTATIONS, find_last_uses, is_read_by_layers, read_by, with_views
from .sizes import are_alike, can_run_sparse, pixels_per_sample, sizes_of
from .split import Split
from .steps import Attention, Copy, Operation, Pointwise, Sparse, Step, Torch
from .taps import Taps
from .token_views import TokenViews

__all__ = ["Copy", "Operation", "Plan", "Pointwise", "Sparse", "Step", "Torch", "can_run_sparse"]

aten = torch.ops.aten
# Elementwise functions that map 0 to 0, so that padding stays 0.
POINTWISE = {
    *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.hardswish.default),
    *(aten.leaky_relu.default, aten.elu.default, aten.mish.default, aten.tanh.default),
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor),
}
BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)
MEAN = (aten.mean.dim, aten.adaptive_avg_pool2d.default)


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
        batch: Any = None,
    ) -> Plan:
        """Return the plan of a captured graph.

        Args:
            graph: its layers are nodes whose target is a `Layer`.
            sparse: the layers that run sparse.
            constants: values of the `get_attr` nodes. Without them, the only steps are `Torch`,
                `Copy`, `Sparse` and `Pointwise`.
            batch: size or symbol of the batch; None: the first dimension of the first input.
        """
        builder = Builder(cls(graph), sparse, constants, batch)
        for node in graph.nodes:
            builder.add(node)
        plan = builder.plan
        plan.steps = with_views(plan.steps, builder.views.pending, plan.outputs)
        plan.last_use = find_last_uses(plan.steps, plan.planes, plan.read_in_pytorch)
        return plan

    @property
    def outputs(self) -> list[Node]:
        """The nodes that the graph returns."""
        return [n for node in self.graph.nodes if node.op == "output" for n in node.all_input_nodes]

    @property
    def read_in_pytorch(self) -> set[Node]:
        """The nodes whose values PyTorch reads, or the graph returns."""
        steps = (step for step in self.steps if not isinstance(step, Copy))
        sizes = {step for step in self.steps if isinstance(step, Torch) and step.reads_size}
        return {n for step in steps if step not in sizes for n in read_by(step)} | {*self.outputs}


class Builder:
    """Adds the steps of one node after the other to a plan.

    Args:
        plan: an empty plan.
        sparse: the layers that run sparse.
        constants: values of the `get_attr` nodes; None if `Operation` steps are not supported.
        batch: size or symbol of the batch; None: the first dimension of the first input.

    Example:
        >>> Builder(Plan(Graph()), []).plan.steps
        []
    """

    def __init__(
        self,
        plan: Plan,
        sparse: Collection[Layer],
        constants: Mapping[Node, Any] | None = None,
        batch: Any = None,
    ) -> None:
        self.plan, self.sparse, self.constants = plan, sparse, constants
        self._copies: dict[Any, Planes] = {}  # planes that were copied, by source and layout
        self._parts: dict[Node, list[Planes]] = {}  # planes of nodes that return several values
        given = [n.meta.get("val") for n in plan.graph.nodes if n.op == "placeholder"]
        first = given[0].shape[0] if given and isinstance(given[0], Tensor) else 1
        self._batch: Any = first if batch is None else batch
        self.views = TokenViews(plan.planes, self._batch)

    def add(self, node: Node) -> None:
        """Add the step of a node, and the copies that it needs."""
        if node.op != "call_function":
            return
        if isinstance(node.target, Layer):
            step: Step = self._layer(node, node.target)
        elif self._is_in_planes(node):
            return
        else:
            step = self._operation(node) or Torch(node)
        if not isinstance(step, Torch) and node not in self.views.pending:
            self.plan.planes[node] = step.out
        self.plan.steps.append(step)

    def empty(self, node: Node, linear: bool, like: Planes | None = None) -> Planes:
        """Return new planes for the value of a node.

        Args:
            node: the node.
            linear: whether channels are the last dimension.
            like: planes whose pixels are alike.
        """
        shape = node.meta["val"].shape
        if not linear:
            channels, height, width = (int(n) for n in shape[1:])
            return Planes(
                PlaneLayout(height, width), channels, height, width, (channels, height, width)
            )
        channels = int(shape[-1])
        if like is not None and like.tokens is None:
            h, w = like.height, like.width
            return Planes(PlaneLayout(h, w), channels, h, w, (h, w, channels), linear=True)
        pixels = pixels_per_sample(shape[:-1], self._batch)
        assert pixels is not None
        sample = (channels,) if len(shape) == 2 else (pixels, channels)
        tokens = sizes_of(shape[:-1], self._batch)
        layout = PlaneLayout(1, pixels, is_fixed=True)
        return Planes(layout, channels, 1, pixels, sample, linear=True, tokens=tokens)

    def copied(self, node: Node, out: Planes, key: Any) -> Planes:
        """Return planes like `out` into which the value of a node was copied."""
        if (node, key) not in self._copies:
            self._copies[node, key] = out
            self.plan.steps.append(Copy(node, out, (out.height, out.width)))
        return self._copies[node, key]

    def in_planes(self, node: Any, out: Planes) -> Planes:
        """Return planes of a value that can share a layout with `out`; copied if necessary."""
        found = self.plan.planes.get(node)
        if found is not None and alike(found, out) and found.layout.can_merge(out.layout):
            return found
        like = out if out.linear and out.tokens is None else None
        new = self.empty(node, out.linear, like)
        return self.copied(node, new, (out.linear, like and out.layout))

    def _layer(self, node: Node, layer: Layer) -> Step:
        if layer not in self.sparse or not self._fits(node):
            return Torch(node)
        permuted = self.views.layer(node, layer) if self.constants is not None else None
        return permuted or self._sparse(node, layer)

    def _sparse(self, node: Node, layer: Layer) -> Sparse:
        taps, source = Taps.from_layer(layer), node.args[0]
        assert isinstance(source, Node)
        if layer.stride != (1, 1) or layer.padding_value != 0.0:
            moves = self.constants is not None
            split = Split(self.plan.planes, self.plan.steps, self._copies, moves)
            x = split.planes_of(source, layer, taps)
        else:
            found = self.plan.planes.get(source)
            is_image = found is not None and found.linear and found.tokens is None
            x = self.in_planes(
                source, self.empty(source, layer.linear, found if is_image else None)
            )
            if not x.layout.can_have(*taps.reach):
                x = self.copied(source, self.empty(source, layer.linear), "padded")
        out = self.empty(node, layer.linear, x)
        out.layout.merge(x.layout)
        residual = self.in_planes(node.args[1], out) if len(node.args) > 1 else None
        if residual is not None:
            out.layout.merge(residual.layout)
        for planes in (x, out):
            out.layout.require(planes.height, planes.width, *taps.reach)
        return Sparse(layer, taps, x, out, residual)

    def _fits(self, node: Node) -> bool:
        """Return whether a layer can read the planes of its inputs.

        A linear layer of the rows of images cannot: their channels are other ones.
        """
        planes = [self.plan.planes.get(n) for n in node.all_input_nodes]
        return not node.target.linear or all(  # type: ignore[union-attr]
            p is None or p.linear for p in planes
        )

    def _operation(self, node: Node) -> Pointwise | Operation | Attention | None:
        """Return the step of a function that is no layer; None if PyTorch computes it."""
        step: Pointwise | Operation | Attention | None = None
        if self.constants is not None:
            if node.target is aten.scaled_dot_product_attention.default:
                return self.views.attention(node)
            if node.target in MEAN:
                step = self._mean(node)
            elif node.target is aten.layer_norm.default:
                step = self._layer_norm(node)
            elif name := activation_of(node):
                step = self._activation(node, name)
            elif node.target is aten.mul.Tensor:
                step = self._scale(node)
        if step is None and node.target in POINTWISE:
            step = self._pointwise(node)
        return step

    def _is_in_planes(self, node: Node) -> bool:
        """Find the planes of a node whose value is in planes without a step of its own."""
        planes, source = self.plan.planes, node.args[0] if node.args else None
        if self.constants is None:
            return False
        found: Any = None
        if node.target is aten.cat.default:
            found = Concatenation(planes, self.plan.steps, self.empty).planes_of(node)
        elif isinstance(source, Node) and source in self._parts:
            index = node.args[1]
            assert isinstance(index, int)
            found = self._parts[source][index]
        elif isinstance(source, Node) and source in planes:
            found = alias_of(node, planes[source], self._batch)
            if found is None and (parts := channels_of(node, planes[source])):
                self._parts[node] = parts
                return True
        if found is None:
            self._copy_before_permutation(node)
            found = self.views.add(node)
        if isinstance(found, Planes):
            planes[node] = found
        return bool(found)

    def _pointwise(self, node: Node) -> Pointwise | None:
        """Return the step of an elementwise function whose inputs are planes of one shape."""
        binary = node.target in BINARY
        if binary and not all(isinstance(a, Node) for a in node.args):
            return None
        x = [self.plan.planes.get(n) for n in node.all_input_nodes]
        if binary:
            x = self._other_tokens(node, x)
        first = x[0] if x else None
        if first is None:
            return None
        found = []
        for planes in x:
            if planes is None or not alike(planes, first) or planes.channels != first.channels:
                return None
            if not planes.layout.can_merge(first.layout):
                return None
            found.append(planes)
        out = self._like(node, first)
        for planes in found:
            out.layout.merge(planes.layout)
        return Pointwise(node, tuple(found), out)

    def _other_tokens(self, node: Node, x: list[Planes | None]) -> list[Planes | None]:
        """Return planes of both operands if one is tokens in planes, and the other is like it.

        Otherwise a residual connection would leave the planes, and return to them, at each layer.
        """
        known = next((p for p in x if p is not None), None)
        values = [n.meta["val"] for n in (node, *node.all_input_nodes)]
        if known is None or known.tokens is None or None not in x or not are_alike(values):
            return x
        return [self.in_planes(n, known) for n in node.all_input_nodes]

    def _like(self, node: Node, x: Planes) -> Planes:
        """Return new planes for the result of a function, alike and in the layout of its input."""
        out = self.empty(node, x.linear, x)
        out.layout.merge(x.layout)
        return out

    def _image(self, node: Any) -> Planes | None:
        """Return the planes of images."""
        found = self.plan.planes.get(node)
        return None if found is None or found.linear else found

    def _mean(self, node: Node) -> Operation | None:
        x = self._image(node.args[0])
        if x is None or node.kwargs:
            return None
        if node.target is aten.mean.dim:
            dims = [d % 4 for d in node.args[1] or ()]  # type: ignore[operator, union-attr]
            keeps = len(node.args) > 2 and bool(node.args[2])
            if sorted(dims) != [2, 3]:
                return None
        else:
            keeps = True
            if set(node.args[1] if isinstance(node.args[1], list) else [node.args[1]]) != {1}:
                return None
        return Operation("mean", (x,), self.empty(node, linear=not keeps))

    def _scale(self, node: Node) -> Operation | None:
        """Return the step of a product with one factor per channel and sample."""
        for a, b in (node.args, node.args[::-1]):
            x = self._image(a)
            if x is None or not isinstance(b, Node) or x.height * x.width == 1:
                continue
            value = b.meta["val"]
            if isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() == 4:
                shape = a.meta["val"].shape  # type: ignore[union-attr]
                if str(value.shape[0]) == str(shape[0]) and value.shape[1:] == (x.channels, 1, 1):
                    y = self.in_planes(b, self.empty(b, linear=False))
                    return Operation("scale", (x, y), self._like(node, x))
        return None

    def _activation(self, node: Node, name: str) -> Operation | None:
        x = self.plan.planes.get(node.args[0])  # type: ignore[arg-type]
        if x is None:
            return None
        return Operation("activate", (x,), self._like(node, x), activation=name)

    def _copy_before_permutation(self, node: Node) -> None:
        """Copy tokens that PyTorch computed into planes before they are permuted for layers."""
        source = node.args[0] if node.target in PERMUTATIONS else None
        if not isinstance(source, Node) or source in self.plan.planes:
            return
        value = source.meta["val"]
        is_tokens = isinstance(value, Tensor) and value.dim() == 3 and are_alike([value])
        if (
            is_tokens
            and str(value.shape[0]) == str(self._batch)
            and is_read_by_layers(node, self.sparse)
        ):
            tokens = self.empty(source, linear=True)
            self.views.copied[source] = self.in_planes(source, tokens)

    def _layer_norm(self, node: Node) -> Operation | None:
        args: list[Any] = list(node.args) + [None] * 5
        x = self.plan.planes.get(args[0])
        if node.kwargs or list(args[1]) != [node.meta["val"].shape[-1]]:
            return None
        if x is None and is_read_by_layers(node, self.sparse):
            x = self.in_planes(args[0], self.empty(args[0], linear=True))
        if x is None or not x.linear:
            return None
        assert self.constants is not None
        values = []
        for given, default in ((args[2], torch.ones), (args[3], torch.zeros)):
            value = default(x.channels) if given is None else self.constants.get(given)
            if not isinstance(value, Tensor) or value.dtype != torch.float32:
                return None
            values.append(value.contiguous().numpy())
        eps = 1e-5 if args[4] is None else float(args[4])
        out = self._like(node, x)
        return Operation("layer_norm", (x,), out, weight=values[0], bias=values[1], eps=eps)
