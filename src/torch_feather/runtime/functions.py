"""Steps of the functions of PyTorch whose inputs are in planes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from .activations import activation_of
from .kernels.plane_operations import FACTORS
from .planes import Planes, alike
from .reading import is_read_by_layers
from .resampling import ADAPTIVE_MAX, RESAMPLES, resampled
from .sizes import are_alike
from .steps import Attention, Operation, Pointwise
from .transposed import MAX_STRIDE

aten = torch.ops.aten
# Elementwise functions that map 0 to 0, so that padding stays 0.
BINARY = {aten.add.Tensor: "add", aten.sub.Tensor: "subtract", aten.mul.Tensor: "multiply"}
POINTWISE = {
    *(aten.relu.default, aten.gelu.default, aten.silu.default, aten.hardswish.default),
    *(aten.leaky_relu.default, aten.elu.default, aten.mish.default, aten.tanh.default),
    *BINARY,
}
SOFTMAX = (aten.softmax.int, aten._softmax.default)
LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)
# More channels of a single token are slower in planes, where a vector has one number of each token.
ONE_TOKEN = 1024
NEAREST = (aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)


class _Places(Protocol):
    """Where values are in planes: the builder of a plan.

    Attributes:
        plan: the plan, with the steps so far.
        planes: planes of the nodes so far.
        constants: values of the nodes that do not depend on the input; None if `Operation` steps
            are not supported.
        sparse: the layers that run sparse.
        views: views of tokens.
    """

    plan: Any
    planes: dict[Node, Planes]
    constants: Any
    sparse: Any
    views: Any

    def empty(self, node: Node, linear: bool, like: Planes | None = None) -> Planes:
        """Return new planes for the value of a node."""

    def in_planes(self, node: Any, out: Planes) -> Planes:
        """Return planes of a value that can share a layout with `out`; copied if necessary."""

    def gathered(self, node: Any) -> Planes | None:
        """Return the planes of a value, also of tokens that a step must bring into their order."""

    def tokens_of_image(self, node: Node) -> Planes | None:
        """Return tokens that are the pixels of images without padding; None if they have some."""


class Functions:
    """Finds the steps of functions that are no layers.

    Args:
        places: where values are in planes.

    Example:
        >>> from types import SimpleNamespace
        >>> from torch.fx import Graph
        >>> node = Graph().call_function(aten.relu.default, (Graph().placeholder("x"),))
        >>> Functions(SimpleNamespace(planes={}, constants=None)).step_of(node) is None
        True
    """

    def __init__(self, places: _Places) -> None:
        self.places, self.planes, self.constants = places, places.planes, places.constants

    def step_of(self, node: Node) -> Pointwise | Operation | Attention | None:
        """Return the step of a function that is no layer; None if PyTorch computes it."""
        step: Pointwise | Operation | Attention | None = None
        if self.constants is not None:
            read = READERS.get(node.target)
            if read is not None:
                step = read(self, node)
            elif name := activation_of(node):
                step = self._activation(node, name)
        if step is None and node.target in POINTWISE:
            step = self._pointwise(node)
        return step

    def _attention(self, node: Node) -> Attention | None:
        found: Attention | None = self.places.views.attention(node)
        return found

    def _pointwise(self, node: Node) -> Pointwise | None:
        """Return the step of an elementwise function whose inputs are planes of one shape."""
        binary = node.target in BINARY
        if binary and not all(isinstance(a, Node) for a in node.args):
            return None
        x = [self.planes.get(n) for n in node.all_input_nodes]
        if binary:
            x = self._other_tokens(node, x)
        first = x[0] if x else None
        if first is None:
            return None
        shapes = {str(n.meta["val"].shape) for n in (node, *node.all_input_nodes)}
        if len(shapes) > 1:  # tokens may be broadcast, as y[:, None] * y[None]
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
        if known is None or None not in x or not are_alike(values):
            return x
        if any(n in self.places.views.pending for n in node.all_input_nodes):
            tokens = [n for n in node.all_input_nodes if n in self.planes]
            known = self.places.tokens_of_image(tokens[0]) or known
        if known.tokens is None:
            return x
        return [self.places.in_planes(n, known) for n in node.all_input_nodes]

    def _like(self, node: Node, x: Planes) -> Planes:
        """Return new planes for the result of a function, alike and in the layout of its input."""
        out = self.places.empty(node, x.linear, x)
        out.layout.merge(x.layout)
        return out

    def _image(self, node: Any) -> Planes | None:
        """Return the planes of images."""
        found = self.planes.get(node)
        return None if found is None or found.linear or found.is_volume else found

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
        return Operation("mean", (x,), self.places.empty(node, linear=not keeps))

    def _product(self, node: Node) -> Operation | None:
        return self._scale(node) or self._scale_pixels(node)

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
                    y = self.places.in_planes(b, self.places.empty(b, linear=False))
                    return Operation("scale", (x, y), self._like(node, x))
        return None

    def _scale_pixels(self, node: Node) -> Operation | None:
        """Return the step of a product with constant factors, one per pixel."""
        for a, b in (node.args, node.args[::-1]):
            x, factors = self._image(a), self.constants.get(b)
            if x is None or not isinstance(factors, Tensor) or factors.dtype != torch.float32:
                continue
            if tuple(factors.shape) == (1, 1, x.height, x.width):
                weight = factors[0, 0].contiguous().numpy()
                return Operation("scale_pixels", (x,), self._like(node, x), weight=weight)
        return None

    def _activation(self, node: Node, name: str) -> Operation | None:
        x = self.planes.get(node.args[0])  # type: ignore[arg-type]
        if x is None:
            return None
        return Operation("activate", (x,), self._like(node, x), activation=name)

    def _pixel_shuffle(self, node: Node) -> Operation | None:
        x, factor = self._image(node.args[0]), node.args[1]
        if x is None or not isinstance(factor, int) or not 1 < factor <= MAX_STRIDE:
            return None
        return Operation(
            "interleave", (x,), self.places.empty(node, False), stride=(factor, factor)
        )

    def _resample(self, node: Node) -> Operation | None:
        """Return the step of interpolation or adaptive pooling."""
        x = self._image(node.args[0])
        if node.target is ADAPTIVE_MAX:
            firsts = (u.target is operator.getitem and u.args[1] == 0 for u in node.users)
            if not all(firsts):  # something reads the positions of the largest pixels
                return None
        return None if x is None else resampled(node, x, self.places.plan.steps)

    def _average(self, node: Node) -> Operation | None:
        return self._mean(node) or self._resample(node)

    def _nearest(self, node: Node) -> Operation | None:
        return self._repeat(node) or self._resample(node)

    def _repeat(self, node: Node) -> Operation | None:
        """Return the step of nearest-neighbor interpolation that repeats pixels equally often."""
        x, sizes = self._image(node.args[0]), node.meta["val"].shape[2:]
        if x is None or len(node.all_input_nodes) > 1 or any(not isinstance(n, int) for n in sizes):
            return None
        factor = sizes[0] // x.height, sizes[1] // x.width
        if factor[1] not in FACTORS or factor[0] < 1:
            return None
        pixels = torch.arange(float(x.height * x.width)).view(1, 1, x.height, x.width)
        repeated = pixels.repeat_interleave(factor[0], 2).repeat_interleave(factor[1], 3)
        interpolate: Any = node.target
        if not torch.equal(interpolate(pixels, *node.args[1:], **node.kwargs), repeated):
            return None
        return Operation("repeat", (x,), self.places.empty(node, False), stride=factor)

    def _softmax(self, node: Node) -> Operation | None:
        """Return the step of softmax, or its logarithm, over the channels."""
        args: list[Any] = [*node.args, None, None]
        source, dim = args[:2]
        if not isinstance(dim, int) or node.meta["val"].dtype != torch.float32:
            return None
        value = source.meta["val"]
        x, dim = self._image(source), dim % max(1, value.dim())
        if x is None and dim == value.dim() - 1:
            x = self.places.gathered(source)
        if x is None or dim != (value.dim() - 1 if x.linear else 1):
            return None
        if x.linear and x.height * x.width == 1 and x.channels > ONE_TOKEN:
            return None
        name = "softmax" if node.target in SOFTMAX else "log_softmax"
        return Operation(name, (x,), self._like(node, x))

    def _layer_norm(self, node: Node) -> Operation | None:
        args: list[Any] = list(node.args) + [None] * 5
        x = self.places.gathered(args[0])
        if node.kwargs or list(args[1]) != [node.meta["val"].shape[-1]]:
            return None
        if x is None and is_read_by_layers(node, self.places.sparse):
            x = self.places.in_planes(args[0], self.places.empty(args[0], linear=True))
        if x is None or not x.linear:
            return None
        if (values := self._affine(args[2:4], x.channels)) is None:
            return None
        eps = 1e-5 if args[4] is None else float(args[4])
        out = self._like(node, x)
        return Operation("layer_norm", (x,), out, weight=values[0], bias=values[1], eps=eps)

    def _group_norm(self, node: Node) -> Operation | None:
        args: list[Any] = list(node.args) + [None] * 5
        x, groups = self._image(args[0]), args[1]
        values = None if x is None else self._affine(args[2:4], x.channels)
        if x is None or values is None or node.kwargs:
            return None
        eps = 1e-5 if args[4] is None else float(args[4])
        weight, bias = values
        out = self._like(node, x)
        return Operation("group_norm", (x,), out, None, weight, bias, eps, groups=groups)

    def _affine(self, given: list[Any], channels: int) -> list[np.ndarray] | None:
        """Return weight and bias of a norm; None if they are not known."""
        values = []
        for node, default in zip(given, (torch.ones, torch.zeros), strict=True):
            value = default(channels) if node is None else self.constants.get(node)
            if not isinstance(value, Tensor) or value.dtype != torch.float32:
                return None
            values.append(value.contiguous().numpy())
        return values


READERS: dict[Any, Callable[[Functions, Node], Operation | Attention | None]] = {
    **dict.fromkeys(RESAMPLES, Functions._resample),
    **dict.fromkeys(NEAREST, Functions._nearest),
    **dict.fromkeys((*SOFTMAX, *LOG_SOFTMAX), Functions._softmax),
    aten.adaptive_avg_pool2d.default: Functions._average,
    aten.mean.dim: Functions._mean,
    aten.mul.Tensor: Functions._product,
    aten.layer_norm.default: Functions._layer_norm,
    aten.group_norm.default: Functions._group_norm,
    aten.pixel_shuffle.default: Functions._pixel_shuffle,
    aten.scaled_dot_product_attention.default: Functions._attention,
}
