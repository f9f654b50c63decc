"""The steps of a network in order, and what each step reads and writes, for any batch size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .aliases import alias_of, channels_of
from .concatenation import Concatenation
from .functions import Functions
from .layer import Layer
from .planes import PlaneLayout, Planes, alike
from .reading import (
    PERMUTATIONS,
    REORDERS,
    find_last_uses,
    is_read_by_layers,
    leads_to_layer,
    read_by,
    with_views,
)
from .recurrent import Recurrent, dimensions
from .sizes import are_alike, can_run_sparse, image_shape, pixels_per_sample, sizes_of
from .split import Split
from .steps import Copy, Operation, Pointwise, Recurrence, Sparse, Step, Torch
from .taps import Taps
from .token_views import TokenViews
from .transposed import TransposedConvolution

__all__ = [
    "Copy",
    "Operation",
    "Plan",
    "Pointwise",
    "Recurrence",
    "Sparse",
    "Step",
    "Torch",
    "can_run_sparse",
]

aten = torch.ops.aten


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
        sparse: Collection[Layer | Recurrent],
        constants: Mapping[Node, Any] | None = None,
        batch: Any = None,
    ) -> Plan:
        """Return the plan of a captured graph.

        Args:
            graph: its layers are nodes whose target is a `Layer`.
            sparse: the layers that run sparse.
            constants: values of the nodes that do not depend on the input, see `constants`. Without
                them, the only steps are `Torch`, `Copy`, `Sparse`, `Pointwise` and the `Operation`
                "interleave".
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
        constants: values of the nodes that do not depend on the input; None if `Operation` steps
            are not supported.
        batch: size or symbol of the batch; None: the first dimension of the first input.

    Example:
        >>> Builder(Plan(Graph()), []).plan.steps
        []
    """

    def __init__(
        self,
        plan: Plan,
        sparse: Collection[Layer | Recurrent],
        constants: Mapping[Node, Any] | None = None,
        batch: Any = None,
    ) -> None:
        self.plan, self.sparse, self.constants = plan, sparse, constants
        self.planes = plan.planes
        self._copies: dict[Any, Planes] = {}  # planes that were copied, by source and layout
        self._parts: dict[Node, list[Planes]] = {}  # planes of nodes that return several values
        given = [n.meta.get("val") for n in plan.graph.nodes if n.op == "placeholder"]
        first = given[0].shape[0] if given and isinstance(given[0], Tensor) else 1
        self._batch: Any = first if batch is None else batch
        self.views = TokenViews(plan.planes, self._batch)

    def add(self, node: Node) -> None:
        """Add the step of a node, and the copies that it needs."""
        if node.op != "call_function" or node in (self.constants or ()):
            return
        if isinstance(node.target, Layer):
            step: Step = self._layer(node, node.target)
        elif isinstance(node.target, Recurrent):
            if node.target in self.sparse and self._fits(node):
                self._recurrent(node, node.target)
                return
            step = Torch(node)
        elif self._is_in_planes(node):
            return
        else:
            step = Functions(self).step_of(node) or Torch(node)
        if not isinstance(step, Torch) and node not in self.views.pending:
            if isinstance(node.meta["val"], Tensor):
                self.planes[node] = step.out
            else:  # further results are not used
                self._parts[node] = [step.out]
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
            size = image_shape(node.meta["val"])
            sample = tuple(int(n) for n in shape[1:])
            return Planes(PlaneLayout(*size[1:]), *size, sample)
        channels = int(shape[-1])
        if like is not None and like.tokens is None:
            h, w = like.height, like.width
            return Planes(PlaneLayout(h, w), channels, h, w, (h, w, channels), linear=True)
        return self._tokens(shape[:-1], channels)

    def _tokens(self, sizes: Sequence[Any], channels: int) -> Planes:
        """Return new planes for tokens of these sizes, which have no padding."""
        pixels = pixels_per_sample(sizes, self._batch)
        assert pixels is not None
        sample = (channels,) if len(sizes) == 1 else (pixels, channels)
        tokens = sizes_of(sizes, self._batch)
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
        found = self.gathered(node)
        if found is not None and alike(found, out) and found.layout.can_merge(out.layout):
            return found
        like = out if out.linear and out.tokens is None else None
        new = self.empty(node, out.linear, like)
        return self.copied(node, new, (out.linear, like and out.layout))

    def gathered(self, node: Any) -> Planes | None:
        """Return the planes of a value, also of tokens that a step must bring into their order."""
        step = None if node in self.planes else self.views.gathered(node, self.empty)
        if step is not None:
            self.planes[node] = step.out
            self.plan.steps.append(step)
        return self.planes.get(node)

    def _layer(self, node: Node, layer: Layer) -> Step:
        """Return the last step of a layer."""
        if layer not in self.sparse or not self._fits(node):
            return Torch(node)
        if self.constants is not None and (permuted := self.views.layer(node, layer)):
            return permuted
        form = layer.kernel_form
        if not isinstance(layer, TransposedConvolution):
            return self._sparse(node, form, self.empty)
        stride = layer.stride

        def parts(node: Node, linear: bool, like: Planes | None) -> Planes:
            """Return planes of the pixels of the result that are interleaved."""
            sizes = node.meta["val"].shape[2:]
            height, width = (-(-int(n) // s) for n, s in zip(sizes, stride, strict=True))
            size = form.channels[1], height, width
            return Planes(PlaneLayout(height, width), *size, size)

        step = self._sparse(node, form, parts)
        self.plan.steps.append(step)
        return Operation("interleave", (step.out,), self.empty(node, False), stride=stride)

    def _recurrent(self, node: Node, layer: Recurrent) -> None:
        """Add the steps of the layers of an LSTM or GRU."""
        source, states = node.args[0], node.args[1:]
        assert isinstance(source, Node)
        value, steps = source.meta["val"], self.plan.steps
        x = self.in_planes(source, self.empty(source, linear=True))
        count = int(dimensions(layer, value)[1])
        for number, directions in enumerate(layer.parts):
            products = []
            for direction in directions:
                product = direction.product
                out = self._tokens(value.shape[:-1], product.channels[1])
                out.layout.merge(x.layout)
                steps.append(Sparse(product, Taps.from_layer(product), x, out))
                products.append(out)
            out = self._tokens(value.shape[:-1], layer.units * len(directions))
            out.layout.merge(x.layout)
            steps.append(
                Recurrence(
                    *(node, layer.kind, tuple(directions), tuple(products), out),
                    states,  # type: ignore[arg-type]
                    *(number, layer.layers, count, layer.batch_first),
                )
            )
            x = out
        self._parts[node] = [x]

    def _sparse(self, node: Node, layer: Layer, empty: Callable[..., Planes]) -> Sparse:
        """Return the step of a sparse layer.

        Args:
            node: its node.
            layer: the layer whose taps are used.
            empty: function that returns new planes for the result.
        """
        taps, source = Taps.from_layer(layer), node.args[0]
        assert isinstance(source, Node)
        if layer.stride != (1, 1) or layer.padding_value != 0.0:
            moves = self.constants is not None
            split = Split(self.planes, self.plan.steps, self._copies, moves)
            x = split.planes_of(source, layer, taps)
        else:
            found = self.planes.get(source)
            is_image = found is not None and found.linear and found.tokens is None
            x = self.in_planes(
                source, self.empty(source, layer.linear, found if is_image else None)
            )
            if not x.layout.can_have(*taps.reach):
                x = self.copied(source, self.empty(source, layer.linear), "padded")
        out = empty(node, layer.linear, x)
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
        planes = [self.planes.get(n) for n in node.all_input_nodes]
        is_linear = isinstance(node.target, Recurrent) or node.target.linear  # type: ignore[union-attr]
        return not is_linear or all(p is None or p.linear for p in planes)

    def _is_in_planes(self, node: Node) -> bool:
        """Find the planes of a node whose value is in planes without a step of its own."""
        planes, source = self.planes, node.args[0] if node.args else None
        if self.constants is None:
            return False
        found: Any = None
        if node.target is aten.cat.default:
            found = Concatenation(planes, self.plan.steps, self.empty).planes_of(node)
        elif isinstance(source, Node) and source in self._parts:
            index = node.args[1]
            assert isinstance(index, int)
            found = self._parts[source][index] if index < len(self._parts[source]) else None
        elif isinstance(source, Node) and source in planes and not planes[source].is_volume:
            found = alias_of(node, planes[source], self._batch)
            if found is None and (parts := channels_of(node, planes[source])):
                self._parts[node] = parts
                return True
        if found is None:
            self._copy_before_permutation(node)
            self._copy_before_windows(node)
            found = self.views.add(node)
        if isinstance(found, Planes):
            planes[node] = found
        return bool(found)

    def _copy_before_permutation(self, node: Node) -> None:
        """Copy tokens that PyTorch computed into planes before they are permuted for layers."""
        source = node.args[0] if node.target in PERMUTATIONS else None
        if not isinstance(source, Node) or source in self.planes:
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

    def _copy_before_windows(self, node: Node) -> None:
        """Copy images whose channels are the last dimension before their pixels are reordered."""
        source: Any = node.args[0] if node.target in REORDERS else None
        if source not in self.planes or source in self.views.copied:
            return
        if leads_to_layer(node, self.sparse) and (tokens := self.tokens_of_image(source)):
            self.views.copied[source] = tokens

    def tokens_of_image(self, node: Node) -> Planes | None:
        """Return tokens that are the pixels of images without padding; None if they have some."""
        image = self.planes[node]
        if not image.linear or image.tokens is not None or not image.layout.fix():
            return None
        return self.in_planes(node, self.empty(node, linear=True))
