"""Networks of sequences as networks of images of one row.

The runtime computes two-dimensional convolutions. A one-dimensional one is the same with a kernel
of one row. So a value (batch, channels, length) after a one-dimensional convolution becomes a value
(batch, channels, 1, length), and so do the results of the functions after it, as long as they have
a form for images. Other functions get the squeezed value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
BATCH_NORM = aten._native_batch_norm_legit_no_training.default  # returns statistics, too
ROW = 2  # the dimension that is inserted

SAME = {  # functions that have the same arguments for any number of dimensions
    *(aten.relu.default, aten.relu6.default, aten.gelu.default, aten.silu.default),
    *(aten.hardswish.default, aten.hardsigmoid.default, aten.sigmoid.default, aten.tanh.default),
    *(aten.leaky_relu.default, aten.elu.default, aten.mish.default, aten.hardtanh.default),
    *(aten.clamp.default, aten.softplus.default, aten.exp.default, aten.neg.default),
    *(aten.alias.default, aten.detach.default, aten.contiguous.default, aten.clone.default),
    *(aten.batch_norm.default, BATCH_NORM),
    operator.getitem,
}
BINARY = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
CONVOLUTIONS: dict[Any, Any] = {
    aten.conv1d.default: aten.conv2d.default,
    aten.conv1d.padding: aten.conv2d.padding,
    aten.conv_transpose1d.default: aten.conv_transpose2d.input,
}
# Values for the row of the arguments after the first one, of pooling and interpolation; None for
# arguments that stay the same.
POOLINGS: dict[Any, tuple[Any, tuple[float | None, ...]]] = {
    aten.max_pool1d.default: (aten.max_pool2d.default, (1, 1, 0, 1)),
    aten.avg_pool1d.default: (aten.avg_pool2d.default, (1, 1, 0)),
    aten.adaptive_avg_pool1d.default: (aten.adaptive_avg_pool2d.default, (1,)),
    aten.adaptive_max_pool1d.default: (aten.adaptive_max_pool2d.default, (1,)),
    aten.upsample_nearest1d.vec: (aten.upsample_nearest2d.vec, (1, 1.0)),
    aten._upsample_nearest_exact1d.vec: (aten._upsample_nearest_exact2d.vec, (1, 1.0)),
    aten.upsample_linear1d.vec: (aten.upsample_bilinear2d.vec, (1, None, 1.0)),
}
PADS = (aten.pad.default, aten.constant_pad_nd.default)
# Functions of one dimension, and the position of this argument.
WITH_DIM: dict[Any, int] = {
    aten.cat.default: 1,
    aten.slice.Tensor: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.chunk.default: 2,
    aten.softmax.int: 1,
    aten.log_softmax.int: 1,
}


def lift(graph: Graph) -> None:
    """Replace functions of sequences after one-dimensional convolutions by those of images.

    Args:
        graph: the graph, which is modified.

    Example:
        >>> graph = Graph()
        >>> x, weight = graph.placeholder("x"), graph.get_attr("weight")
        >>> x.meta["val"], weight.meta["val"] = torch.ones(1, 2, 8), torch.ones(4, 2, 3)
        >>> node = graph.call_function(aten.conv1d.default, (x, weight))
        >>> node.meta["val"] = torch.ones(1, 4, 6)
        >>> _ = graph.output(node)
        >>> lift(graph)
        >>> [n.target for n in graph.nodes if n.target is aten.conv2d.default]
        [<OpOverload(op='aten.conv2d', overload='default')>]
    """
    if any(node.target in CONVOLUTIONS for node in graph.nodes):
        _Lifting(graph).run()


class _Lifting:
    """Replaces the functions of one graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.lifted: dict[Node, Node] = {}
        self._unsqueezed: dict[Node, Node] = {}
        self._replaced: list[Node] = []

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            with self.graph.inserting_before(node):
                new = self._lift(node)
                if new is not None:
                    self.lifted[node] = new
        for node in self._replaced:
            self.graph.erase_node(node)
        for node, new in reversed(self.lifted.items()):
            if node.users:
                with self.graph.inserting_after(new):
                    squeezed = self._call(aten.squeeze.dim, (new, ROW))
                node.replace_all_uses_with(squeezed)
            self.graph.erase_node(node)

    def _lift(self, node: Node) -> Node | None:
        """Return the node for images; None if the function has no such form."""
        if node.target in CONVOLUTIONS:
            return self._convolution(node)
        if not any(n in self.lifted for n in node.all_input_nodes):
            return None
        if node.target in BINARY:
            return self._binary(node)
        if node.target in POOLINGS:
            return self._pooling(node)
        if node.target in WITH_DIM:
            return self._with_dim(node)
        if node.target is aten.mean.dim:
            return self._mean(node)
        if node.target in PADS:
            return self._same(node) if self._pads_constant(node) else None
        if node.target in SAME and node.args[0] in self.lifted:
            statistics = node.target is BATCH_NORM and any(u.args[1] for u in node.users)
            return None if statistics or node.meta.get("is_needed") else self._same(node)
        return None

    def _call(self, target: Callable[..., Any], args: Any, kwargs: Any = None) -> Node:
        """Add a call, with its value as in `torch.export`."""
        node = self.graph.call_function(target, args, kwargs)
        values = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        return node

    def _same(self, node: Node, x: Node | None = None) -> Node:
        """Return the same function of images: of x, or of those of its first argument."""
        args, kwargs = map_arg((node.args[1:], node.kwargs), lambda n: self.lifted.get(n, n))
        first: Any = self.lifted[node.args[0]] if x is None else x  # type: ignore[index]
        return self._call(node.target, (first, *args), kwargs)  # type: ignore[arg-type]

    def _image(self, node: Node) -> Node:
        """Return a value of two or three dimensions with a row."""
        if node in self.lifted:
            return self.lifted[node]
        if node not in self._unsqueezed:
            last = node
            if node.op == "placeholder":
                last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                self._unsqueezed[node] = self._call(aten.unsqueeze.default, (node, -2))
        return self._unsqueezed[node]

    def _convolution(self, node: Node) -> Node | None:
        args: list[Any] = list(node.args)
        if args[0].meta["val"].dim() != 3 or not isinstance(args[1], Node) or node.kwargs:
            return None
        x, args[1] = args[0], self._image(args[1])
        is_padded = x not in self.lifted and self._pads_constant(x)
        args[0] = self._same(x, self._image(x.args[0])) if is_padded else self._image(x)
        transposed = node.target is aten.conv_transpose1d.default
        row = (1, 0, 0, None, 1) if transposed else (1, 0, 1)
        for i, value in enumerate(row, 3):
            if i < len(args) and value is not None and not isinstance(args[i], str):
                args[i] = _with_row(args[i], value)
        return self._call(CONVOLUTIONS[node.target], tuple(args))

    def _binary(self, node: Node) -> Node | None:
        shape = node.meta["val"].shape
        args = []
        for x in node.args:
            if isinstance(x, Node):
                value = x.meta.get("val")
                if not isinstance(value, Tensor) or value.dim() > 3 or len(shape) != 3:
                    return None
                x = self._image(x) if value.dim() >= 2 else x
            args.append(x)
        return self._call(node.target, tuple(args), node.kwargs)  # type: ignore[arg-type]

    def _pooling(self, node: Node) -> Node | None:
        args: list[Any] = list(node.args)
        target, row = POOLINGS[node.target]
        for i, value in enumerate(row, 1):
            if value is not None and i < len(args) and args[i] not in (None, []):
                args[i] = _with_row(args[i], value)
        return self._call(target, (self.lifted[args[0]], *args[1:]), node.kwargs)

    def _with_dim(self, node: Node) -> Node | None:
        args: list[Any] = list(node.args)
        place = WITH_DIM[node.target]
        if node.kwargs or len(args) <= place or not isinstance(args[place], int):
            return None
        args[place] = _dim(args[place])
        if node.target is aten.cat.default:
            if any(n.meta["val"].dim() != 3 for n in args[0]):
                return None
            args[0] = [self._image(n) for n in args[0]]
        else:
            args[0] = self.lifted[args[0]]
        return self._call(node.target, tuple(args))  # type: ignore[arg-type]

    def _mean(self, node: Node) -> Node | None:
        """Replace a mean over the pixels, which need not keep its dimension."""
        args: list[Any] = list(node.args)
        if node.kwargs or [d % 3 for d in args[1] or ()] != [2]:
            return None
        new = self._call(aten.mean.dim, (self.lifted[args[0]], [2, 3], *args[2:]))
        if len(args) > 2 and args[2]:
            return new
        node.replace_all_uses_with(new)
        self._replaced.append(node)
        return None

    def _pads_constant(self, node: Node) -> bool:
        """Return whether a node pads the last dimension of a sequence with a constant."""
        args: list[Any] = list(node.args)
        if node.target not in PADS or node.kwargs or args[0].meta["val"].dim() != 3:
            return False
        is_constant = node.target is aten.constant_pad_nd.default or args[2:3] in ([], ["constant"])
        return is_constant and len(args[1]) == 2


def _dim(dim: int) -> int:
    """Return the dimension of an image that is a dimension of a sequence."""
    return (0, 1, 3)[dim % 3]


def _with_row(value: Any, row: float) -> list[Any]:
    """Return an argument for rows and columns from one for columns."""
    return [row, value[0] if isinstance(value, list | tuple) else value]
