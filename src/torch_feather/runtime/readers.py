"""Layers that the nodes of a captured graph compute."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .layer import AvgPool, Layer, MaxPool
from .transposed import transposed_convolution
from .volumes import VolumeConvolution

aten = torch.ops.aten
BATCH_NORM = aten._native_batch_norm_legit_no_training.default  # returns statistics, too
BATCH_NORMS = (BATCH_NORM, aten.batch_norm.default)
VOLUMES = (aten.conv3d.default,)
PADS = (aten.pad.default, aten.constant_pad_nd.default)

Constants = dict[Node, Tensor]


def read_layer(node: Node, constants: Constants, activations: bool = True) -> Layer | None:
    """Return the layer that a node computes; None if it is no layer with constant weights.

    Args:
        node: the node.
        constants: values of the nodes that do not depend on the input.
        activations: whether average pooling, and products with matrices or with a factor per
            channel, are layers.

    Example:
        >>> from torch.fx import Graph
        >>> graph = Graph()
        >>> x, weight = graph.placeholder("x"), graph.get_attr("weight")
        >>> x.meta["val"] = torch.ones(2, 3)
        >>> node = graph.call_function(aten.linear.default, (x, weight))
        >>> read_layer(node, {weight: torch.ones(4, 3)}).channels
        (3, 4)
    """
    if node.op != "call_function":
        return None
    read = LAYERS.get(node.target)
    if read is None or (read in SMOOTH and not activations) or not isinstance(node.args[0], Node):
        return None
    x = input_of(node).meta["val"]
    images = x.dim() == (5 if node.target in VOLUMES else 4)
    is_linear = node.target is aten.linear.default or read is _product
    if x.dtype != torch.float32 or not (images or is_linear):
        return None
    found: Layer | None = read(node, constants)
    return found


def input_of(node: Node) -> Node:
    """Return the input of the node of a layer.

    Example:
        >>> from torch.fx import Graph
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> input_of(graph.call_function(aten.conv2d.default, (x, graph.placeholder("w")))) is x
        True
    """
    x = node.args[1 if node.target is aten.addmm.default else 0]
    assert isinstance(x, Node)
    return x


def padded(x: Node, layer: Layer) -> tuple[Node, Layer]:
    """Return the input of a layer without zeros that a node pads, and a layer that pads them.

    Args:
        x: the input.
        layer: the layer.

    Example:
        >>> from torch.fx import Graph
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> x.meta["val"] = torch.ones(1, 1, 4, 4)
        >>> pad = graph.call_function(aten.pad.default, (x, [1, 0]))
        >>> layer = Layer("weight", torch.ones(1, 1, 2, 2), torch.zeros(1))
        >>> padded(pad, layer)[1].padding
        (0, 1)
    """
    args: list[Any] = [*x.args, *[None] * 4]
    if x.target not in PADS or type(layer) is not Layer or layer.linear or x.kwargs:
        return x, layer
    sides, mode, value = args[1], "constant", args[2]
    if x.target is aten.pad.default:
        mode, value = args[2] or "constant", args[3]
    is_zeros = mode == "constant" and not value and args[0].meta["val"].dim() == 4
    if not is_zeros or any(not isinstance(n, int) or n < 0 for n in sides) or any(sides[4:]):
        return x, layer
    left, right, top, bottom = [*sides[:4], 0, 0][:4]
    before, after = layer.padding, layer.padding_after or layer.padding
    return args[0], layer.with_padding(
        (before[0] + top, before[1] + left), (after[0] + bottom, after[1] + right)
    )


def cropped(user: Node, last: Node, layer: Layer) -> Layer | None:
    """Return a layer that computes only the rows or columns that `user` selects; None if it cannot.

    Causal convolutions pad both sides, and drop the last columns of the result.

    Args:
        user: node after the layer.
        last: node of the result of the layer.
        layer: the layer.

    Example:
        >>> from torch.fx import Graph
        >>> graph = Graph()
        >>> last = graph.placeholder("x")
        >>> last.meta["val"] = torch.ones(1, 1, 4, 6)
        >>> node = graph.call_function(aten.slice.Tensor, (last, 3, 0, -2))
        >>> node.meta["val"] = torch.ones(1, 1, 4, 4)
        >>> layer = Layer("weight", torch.ones(1, 1, 1, 3), torch.zeros(1), padding=(0, 2))
        >>> cropped(node, last, layer).padding_after
        (0, 0)
    """
    if user.target is not aten.slice.Tensor or type(layer) is not Layer or layer.linear:
        return None
    args: list[Any] = [*user.args, *[None] * 5]
    if user.kwargs or args[0] is not last or args[1] is None or args[4] not in (None, 1):
        return None
    axis = args[1] % 4 - 2
    start, sizes, kept = args[2] or 0, last.meta["val"].shape[2:], user.meta["val"].shape[2:]
    if axis < 0 or not all(isinstance(n, int) for n in (start, *sizes, *kept)):
        return None
    start = start + sizes[axis] if start < 0 else start
    end = sizes[axis] - kept[axis] - start  # pixels that are dropped there
    if kept[axis] < 1 or end < 0:
        return None
    before, after = list(layer.padding), list(layer.padding_after or layer.padding)
    before[axis] -= start * layer.stride[axis]
    after[axis] -= end * layer.stride[axis]
    return layer.with_padding((before[0], before[1]), (after[0], after[1]))


def folded(user: Node, layer: Layer, constants: Constants) -> Layer | None:
    """Return the layer with a batch norm folded in; None if `user` is none that can be folded.

    Example:
        >>> from torch.fx import Graph
        >>> user = Graph().placeholder("x")
        >>> folded(user, Layer("weight", torch.ones(1, 1, 1, 1), torch.zeros(1)), {}) is None
        True
    """
    if user.target not in BATCH_NORMS or layer.linear:
        return None
    if user.target is BATCH_NORM:
        if any(u.target is not operator.getitem or u.args[1] != 0 for u in user.users):
            return None  # the model uses the statistics
        if len(user.users) != 1:
            return None
        eps = user.args[6]
    else:
        eps = user.args[7]
        if user.args[5]:  # the statistics of the batch
            return None
    weight, bias, mean, var = (constants.get(a) for a in user.args[1:5])  # type: ignore[arg-type]
    if mean is None or var is None:
        return None
    factor = (var.double() + eps).rsqrt()  # type: ignore[operator]
    if weight is not None:
        factor = factor * weight.double()
    shift = -mean.double() * factor
    return layer.scaled(factor, shift if bias is None else shift + bias.double())


def _max_pool(node: Node, constants: Constants) -> Layer | None:
    args: list[Any] = list(node.args) + [None] * 7
    kernel, stride = _pair(args[1], 1), _pair(args[2] or args[1], 1)
    padding, dilation = _pair(args[3], 0), _pair(args[4], 1)
    shape, out = args[0].meta["val"].shape, node.meta["val"].shape
    layer = MaxPool.create(node.name, shape[1], kernel, stride, padding, dilation)
    if not args[5]:
        return layer
    # ceil_mode: the last windows may extend over the end by more than the padding.
    y, x = (
        (out[2 + i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 - shape[2 + i] - padding[i]
        for i in (0, 1)
    )
    return replace(layer, padding_after=(y, x))


def _avg_pool(node: Node, constants: Constants) -> Layer | None:
    args: list[Any] = list(node.args) + [None] * 7
    kernel, stride = _pair(args[1], 1), _pair(args[2] or args[1], 1)
    padding, counts_padding = _pair(args[3], 0), args[5] is None or args[5]
    if args[4] or args[6] or node.kwargs or (padding != (0, 0) and not counts_padding):
        return None
    return AvgPool.create(node.name, args[0].meta["val"].shape[1], kernel, stride, padding)


def _adaptive_avg_pool(node: Node, constants: Constants) -> Layer | None:
    """Return average pooling to some size, if all windows are alike. One pixel is a mean."""
    shape, out = (n.meta["val"].shape[1:] for n in (node.args[0], node))  # type: ignore[union-attr]
    known = all(isinstance(n, int) for n in (*shape, *out))
    if not known or out[1:] == (1, 1) or shape[1] % out[1] or shape[2] % out[2]:
        return None
    window = shape[1] // out[1], shape[2] // out[2]
    return AvgPool.create(node.name, shape[0], window, window, (0, 0))


def _channel_factors(node: Node, constants: Constants) -> Layer | None:
    """Return the depthwise layer of a product with a constant factor per channel of images."""
    x: Any = node.args[0]
    factors, channels = constants.get(node.args[1]), x.meta["val"].shape[1]  # type: ignore[arg-type]
    if x in constants or factors is None or factors.dtype != torch.float32:
        return None
    if tuple(factors.shape) not in ((channels, 1, 1), (1, channels, 1, 1)):
        return None
    weight = factors.reshape(channels, 1, 1, 1).contiguous()
    name = name_of_weight(node.args[1])  # type: ignore[arg-type]
    return Layer(name, weight, weight.new_zeros(channels), groups=channels)


def _batch_norm(node: Node, constants: Constants) -> Layer | None:
    x = node.args[0].meta["val"]  # type: ignore[union-attr]
    channels = x.shape[1]
    ones = torch.ones(channels, 1, 1, 1, dtype=x.dtype, device="cpu")
    identity = Layer(node.name, ones, ones.new_zeros(channels), groups=channels)
    return folded(node, identity, constants)


def _weights(node: Node, constants: Constants, out: int = 0) -> tuple[Tensor, Tensor] | None:
    """Return weight and bias of a layer, if they are constant and float32.

    Args:
        node: node of the layer.
        constants: values of the nodes that do not depend on the input.
        out: number of output channels. [default: the first dimension of the weight]
    """
    args: list[Any] = list(node.args) + [None] * 3
    weight, bias = constants.get(args[1]), constants.get(args[2])
    if weight is None or (bias is None and args[2] is not None) or weight.dim() < 2:
        return None
    out = out or len(weight)
    bias = weight.new_zeros(out) if bias is None else bias
    if bias.shape != (out,) or {weight.dtype, bias.dtype} != {torch.float32}:
        return None
    return weight, bias


def name_of_weight(node: Node) -> str:
    """Return the name of a weight, also if the graph reshapes it.

    Example:
        >>> from torch.fx import Graph
        >>> graph = Graph()
        >>> node = graph.call_function(aten.unsqueeze.default, (graph.get_attr("weight"), 2))
        >>> name_of_weight(node)
        'weight'
    """
    source = node.args[0] if node.target is aten.unsqueeze.default else node
    if isinstance(source, Node) and source.op == "get_attr":
        return str(source.target)
    return node.name


def _weighted(node: Node, constants: Constants) -> Layer | None:
    """Return a convolution or linear layer."""
    args: list[Any] = list(node.args) + [None] * 7
    if (found := _weights(node, constants)) is None:
        return None
    weight, bias = found
    name = name_of_weight(args[1])
    if node.target is aten.linear.default:
        return Layer(name, weight, bias)
    stride, dilation = _pair(args[3], 1), _pair(args[5], 1)
    layer = Layer(name, weight, bias, stride, (0, 0), dilation, args[6] or 1)
    if args[4] == "same":
        y, x = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
        return layer.with_padding((y // 2, x // 2), (y - y // 2, x - x // 2))
    padding = (0, 0) if args[4] == "valid" else _pair(args[4], 0)
    return layer.with_padding(padding, padding)


def _transposed(node: Node, constants: Constants) -> Layer | None:
    """Return a transposed convolution."""
    args: list[Any] = list(node.args) + [None] * 8
    weight, groups = constants.get(args[1]), args[6] or 1
    out = 0 if weight is None else weight.shape[1] * groups
    if (found := _weights(node, constants, out)) is None:
        return None
    return transposed_convolution(
        name_of_weight(args[1]),
        *found,
        stride=_pair(args[3], 1),
        padding=_pair(args[4], 0),
        output_padding=_pair(args[5], 0),
        dilation=_pair(args[7], 1),
        groups=groups,
    )


def _volume(node: Node, constants: Constants) -> Layer | None:
    """Return a three-dimensional convolution."""
    args: list[Any] = list(node.args) + [None] * 7
    found, depth = _weights(node, constants), node.args[0].meta["val"].shape[2]  # type: ignore[union-attr]
    if found is None or isinstance(args[4], str) or not isinstance(depth, int):
        return None
    strides, paddings, dilations = (
        [default] * 3 if value is None else list(value) * (3 // len(value))
        for value, default in ((args[3], 1), (args[4], 0), (args[5], 1))
    )
    return VolumeConvolution(
        name_of_weight(args[1]), *found,
        (strides[1], strides[2]), (paddings[1], paddings[2]), (dilations[1], dilations[2]),
        args[6] or 1,
        depth=depth,
        depth_stride=strides[0],
        depth_padding=paddings[0],
        depth_dilation=dilations[0],
    )  # fmt: skip


def _product(node: Node, constants: Constants) -> Layer | None:
    """Return the linear layer of a product with a constant matrix: x @ weight + bias."""
    given: list[Any] = list(node.args)
    bias_node, x, matrix = given if len(given) == 3 else (None, *given)
    weight, bias = constants.get(matrix), constants.get(bias_node)
    if weight is None or node.kwargs or x in constants or (bias is None and bias_node is not None):
        return None
    weight = weight.t().contiguous()
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if bias.shape != weight.shape[:1] or {weight.dtype, bias.dtype} != {torch.float32}:
        return None
    name = matrix.target if matrix.op == "get_attr" else matrix.name
    return Layer(str(name), weight, bias)


LAYERS: dict[Any, Any] = {
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten.mul.Tensor: _channel_factors,
    BATCH_NORM: _batch_norm,
    aten.batch_norm.default: _batch_norm,
    aten.conv2d.default: _weighted,
    aten.conv2d.padding: _weighted,
    aten.conv_transpose2d.input: _transposed,
    aten.conv3d.default: _volume,
    aten.linear.default: _weighted,
    aten.addmm.default: _product,
    aten.mm.default: _product,
}


SMOOTH = (_avg_pool, _adaptive_avg_pool, _product, _channel_factors)


def _pair(value: Any, default: int) -> tuple[int, int]:
    if value is None:
        return default, default
    values = list(value) * (2 // len(value))
    return values[0], values[1]
