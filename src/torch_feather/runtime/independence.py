"""Whether a graph keeps the samples of a batch apart.

A network may process a batch in parts only if no sample affects the result for another one. This
follows from the graph: each function must be known to keep samples apart in the dimension in which
they are. For all other functions and arguments, samples count as mixed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from .aliases import RESHAPES, SPLITS
from .aliases import SAME as COPIES
from .constants import CREATES_LIKE, CREATES_NEW
from .layer import Layer
from .recurrent import Recurrent
from .resampling import RESAMPLES
from .samples import Follower, MixedError, Rows, Samples, require

aten = torch.ops.aten
# Functions of corresponding elements that PyTorch does not mark as such: of all arguments, and of
# the first one.
POINTWISE = {
    *(aten.masked_fill.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar),
    *(aten.__and__.Tensor, aten.__or__.Tensor, aten.floor_divide.default),
}
SAME = {
    *(*COPIES, aten.hardswish.default, aten.type_as.default, aten._to_copy.default),
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other),
}
# Functions along dimensions that keep these dimensions, with another size perhaps.
ALONG = {
    *(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default),
    *(aten.cumsum.default, aten.cumprod.default, aten.flip.default, aten.roll.default),
    *(aten.sort.default, aten.argsort.default, aten.topk.default, aten.glu.default),
    *(aten.slice.Tensor, aten.narrow.default, *SPLITS),
}
# Functions along dimensions that drop these dimensions, or have `keepdim`.
REDUCE = {
    *(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.std.dim),
    *(aten.var.dim, aten.var.correction, aten.std.correction, aten.logsumexp.default),
    *(aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default, aten.any.dim),
    *(aten.all.dim, aten.prod.dim_int, aten.norm.ScalarOpt_dim, aten.linalg_vector_norm.default),
    *(aten.select.int, aten.unbind.int),
}
# Functions whose first dimension is the samples, and the number of dimensions; without the samples,
# PyTorch accepts one dimension less. None: any number.
FIRST: dict[Any, int | None] = {
    **dict.fromkeys((aten.group_norm.default, aten.instance_norm.default), None),
    **dict.fromkeys((aten.batch_norm.default, aten.prelu.default), None),
    **dict.fromkeys((aten.conv1d.default, aten.conv1d.padding, aten.conv_transpose1d.default), 3),
    **dict.fromkeys((aten.max_pool1d.default, aten.avg_pool1d.default), 3),
    **dict.fromkeys((aten.adaptive_avg_pool1d.default, aten.upsample_linear1d.vec), 3),
    **dict.fromkeys((aten.upsample_nearest1d.vec, aten.adaptive_max_pool1d.default), 3),
    **dict.fromkeys((aten.conv2d.default, aten.conv2d.padding, aten.conv_transpose2d.input), 4),
    **dict.fromkeys((aten.max_pool2d.default, aten.avg_pool2d.default, aten.im2col.default), 4),
    **dict.fromkeys(RESAMPLES, 4),
    **dict.fromkeys((aten.pixel_shuffle.default, aten.pixel_unshuffle.default), 4),
    aten.channel_shuffle.default: 4,
    **dict.fromkeys((aten.conv3d.default, aten.conv3d.padding, aten.conv_transpose3d.input), 5),
    **dict.fromkeys((aten.max_pool3d.default, aten.avg_pool3d.default), 5),
    **dict.fromkeys((aten.adaptive_avg_pool3d.default, aten.upsample_trilinear3d.vec), 5),
}
SQUEEZES = (aten.squeeze.dim, aten.squeeze.dims)


def samples_of(graph: Graph, constants: Mapping[Node, Any], batch: Any) -> Samples | None:
    """Return where the samples are in the values of a graph.

    Args:
        graph: a captured graph, in which layers are fused.
        constants: values of the nodes that do not depend on the input, see `constants`.
        batch: number of samples, at least 2, or its symbol.

    Returns:
        None if a sample may affect the result for another one, or if the first dimension of a
        result is not the samples.

    Example:
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> x.meta["val"] = torch.ones(2, 3)
        >>> y = graph.call_function(aten.softmax.int, (x, 1))
        >>> y.meta["val"] = torch.ones(2, 3)
        >>> _ = graph.output(y)
        >>> samples_of(graph, {}, batch=2).rows[y]
        Rows(dim=0, each=1, outer=1)
        >>> y.args = (x, 0)
        >>> samples_of(graph, {}, batch=2) is None
        True
    """
    if isinstance(batch, int) and batch < 2:
        return None
    follower = Follower(constants, batch, rows_of)
    try:
        for node in graph.nodes:
            follower.add(node)
        return follower.result()
    except MixedError:
        return None


def rows_of(samples: Follower, node: Node) -> Any:
    """Return the rows of the result of a function, a list for several results.

    Args:
        samples: where the samples are in its arguments.
        node: the function.

    Raises:
        MixedError: the function is not known to keep samples apart.

    Example:
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> x.meta["val"] = torch.ones(2, 3)
        >>> samples = Follower({}, 2, rows_of)
        >>> samples.add(x)
        >>> y = graph.call_function(aten.relu.default, (x,))
        >>> y.meta["val"] = torch.ones(2, 3)
        >>> rows_of(samples, y).dim
        0
    """
    target: Any = node.target
    if isinstance(target, Layer):
        return _layer(samples, node, target)
    if isinstance(target, Recurrent):
        return _recurrent(samples, node, target)
    if target is operator.getitem:
        several, index = samples.of(node.args[0]), node.args[1]
        require(isinstance(several, list) and isinstance(index, int))
        return several[index]
    require(isinstance(target, OpOverload) and not target._schema.is_mutable)
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    require(not is_random or target is aten.scaled_dot_product_attention.default)
    args = _bound(node)
    if target in SAME:
        return samples.of(node.args[0])
    if torch.Tag.pointwise in target.tags or target in POINTWISE:
        return samples.aligned(node, node.all_input_nodes)
    if target in ALONG | REDUCE:
        return _along(samples, node, args)
    if target in FIRST:
        return _first(samples, node, args)
    rule = RULES.get(target)
    require(rule)
    assert rule is not None
    return rule(samples, node, args)


def _argument(samples: Follower, node: Node) -> tuple[Rows, int]:
    """Return the rows and the number of dimensions of the only argument that has samples."""
    rows, x = samples.only(node), node.args[0]
    return rows, x.meta["val"].dim()  # type: ignore[union-attr]


def _layer(samples: Follower, node: Node, layer: Layer) -> Rows:
    x: Any = node.args[0]
    rows, rank = samples.of(x), x.meta["val"].dim()
    if layer.linear:
        require(rows.dim < rank - 1)
    else:
        require(rows.dim == 0 and rank == layer.weight.dim())
    return samples.aligned(node, node.all_input_nodes)


def _recurrent(samples: Follower, node: Node, layer: Recurrent) -> list[Rows]:
    rows, states = samples.of(node.args[0]), node.args[1:]
    require(rows.dim == (0 if layer.batch_first else 1))
    own = rows._replace(dim=1)  # (layers, batch, units)
    for state in states:
        assert isinstance(state, Node)
        if state in samples.rows:
            require(samples.rows[state] == own)
        else:
            samples.share(node, state, own)
    return [rows, *[own] * (len(node.meta["val"]) - 1)]


def _along(samples: Follower, node: Node, args: Mapping[str, Any]) -> Rows:
    rows, rank = _argument(samples, node)
    given = args["dims"] if "dims" in args else args["dim"]
    dims = [given] if isinstance(given, int) else list(given or ())
    require(dims)
    dims = [d % rank for d in dims]
    require(rows.dim not in dims)
    if node.target in ALONG or args.get("keepdim"):
        return rows
    return rows._replace(dim=rows.dim - sum(d < rows.dim for d in dims))


def _first(samples: Follower, node: Node, args: Mapping[str, Any]) -> Rows:
    rows, rank = _argument(samples, node)
    require(rows.dim == 0 and rank == (FIRST[node.target] or max(2, rank)))
    require(not args.get("training"))  # a batch norm without fixed statistics
    return rows


def _reshape(samples: Follower, node: Node, args: Mapping[str, Any]) -> Rows:
    """Return the rows after a function that keeps the order of elements.

    In this order, there are `before` parts, each of which consists of all samples. Samples are in
    the dimension that divides a part.
    """
    rows, x = samples.of(node.args[0]), node.args[0].meta["val"]  # type: ignore[union-attr]
    if node.target in SQUEEZES:
        dims = [args["dim"]] if isinstance(args["dim"], int) else args["dim"]
        require(rows.dim not in [d % x.dim() for d in dims])
    before, seen = rows.outer, 1
    for size in x.shape[: rows.dim]:
        require(isinstance(size, int))
        before *= size
    for dim, size in enumerate(node.meta["val"].shape):
        require(not isinstance(size, int) or size > 0)
        if isinstance(size, int) and seen * size <= before:
            seen *= size
            continue
        outer, per_sample = before // seen, samples.per_sample(size)
        require(before % seen == 0 and per_sample is not None and per_sample % outer == 0)
        assert per_sample is not None
        return Rows(dim, per_sample // outer, outer)
    raise MixedError


def _permute(samples: Follower, node: Node, args: Mapping[str, Any]) -> Rows:
    rows, rank = samples.only(node), node.meta["val"].dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [d % rank for d in args["dims"]]
    else:
        a, b = (0, rank - 1) if node.target is aten.t.default else (args["dim0"], args["dim1"])
        order[a], order[b] = order[b], order[a]
    return rows._replace(dim=order.index(rows.dim))


def _cat(samples: Follower, node: Node, args: Mapping[str, Any]) -> Rows:
    tensors = args["tensors"]
    ranks = {n.meta["val"].dim() for n in tensors}
    require(len(ranks) == 1)
    rank = ranks.pop() + (node.target is aten.stack.default)
    rows, dim = _aligned_alike(samples, node, tensors), args["dim"] % rank
    if node.target is aten.stack.default:
        return rows._replace(dim=rows.dim + (dim <= rows.dim))
    require(dim != rows.dim)
    return rows


def _expand(samples: Follower, node: Node, _: Mapping[str, Any]) -> Rows:
    x: Any = node.args[0]
    shape, added = node.meta["val"].shape, node.meta["val"].dim() - x.meta["val"].dim()
    if x in samples.rows:
        return samples.of(x)._replace(dim=samples.of(x).dim + added)
    own = [1] * added + list(x.meta["val"].shape)
    return _filled(samples, shape, own)


def _filled(samples: Follower, shape: Sequence[Any], own: Sequence[Any] | None = None) -> Rows:
    """Return the rows of a value that is equal for all samples: one dimension is the batch."""
    found = [d for d, n in enumerate(shape) if not isinstance(n, int)]
    require(not isinstance(samples.batch, int) and len(found) == 1)
    (dim,) = found
    require(own is None or (isinstance(own[dim], int) and own[dim] == 1))
    return Rows(dim, samples.per_sample(shape[dim]) or 0)


def _created(samples: Follower, node: Node, args: Mapping[str, Any]) -> Rows:
    """Return the rows of a tensor of one number."""
    require(not isinstance(args.get("fill_value"), Node))
    if node.target in CREATES_LIKE:
        return samples.only(node)
    return _filled(samples, node.meta["val"].shape)


def _repeat(samples: Follower, node: Node, args: Mapping[str, Any]) -> Rows:
    rows, rank = _argument(samples, node)
    rows = rows._replace(dim=rows.dim + len(args["repeats"]) - rank)
    require(args["repeats"][rows.dim] == 1)
    return rows


def _norm(samples: Follower, node: Node, args: Mapping[str, Any]) -> Rows:
    rows, rank = _argument(samples, node)
    require(rows.dim < rank - len(args["normalized_shape"]))
    return rows


def _pad(samples: Follower, node: Node, args: Mapping[str, Any]) -> Rows:
    rows, rank = _argument(samples, node)
    require(rows.dim < rank - len(args["pad"]) // 2)
    return rows


def _linear(samples: Follower, node: Node, _: Mapping[str, Any]) -> Rows:
    rows, rank = _argument(samples, node)
    require(rows.dim < rank - 1)
    return rows


def _embedding(samples: Follower, node: Node, args: Mapping[str, Any]) -> Rows:
    require(args["weight"] not in samples.rows)
    rows = samples.of(args["indices"])
    assert isinstance(rows, Rows)
    return rows


def _matmul(samples: Follower, node: Node, args: Mapping[str, Any]) -> Rows:
    a, b = node.args[:2]
    assert isinstance(a, Node)
    assert isinstance(b, Node)
    ranks = [n.meta["val"].dim() for n in (a, b)]
    require(min(ranks) >= 2)
    if b not in samples.rows and samples.of(a).dim == ranks[0] - 2:  # samples are rows of a matrix
        return samples.of(a)._replace(dim=node.meta["val"].dim() - 2)
    return samples.aligned(node, [a, b], inner=2)


def _attention(samples: Follower, node: Node, args: Mapping[str, Any]) -> Rows:
    require(args["dropout_p"] == 0.0)
    return samples.aligned(node, node.all_input_nodes, inner=3 if args["enable_gqa"] else 2)


def _aligned_alike(samples: Follower, node: Node, tensors: Sequence[Node]) -> Rows:
    """Return the rows of tensors that all have the samples in the same dimension."""
    found = {samples.rows[n] for n in tensors if n in samples.rows}
    require(len(found) == 1)
    (rows,) = found
    for n in tensors:
        if n not in samples.rows:
            samples.share(node, n, rows)
    return rows


Rule = Callable[[Follower, Node, Mapping[str, Any]], Any]
RULES: dict[Any, Rule] = {
    **dict.fromkeys((*RESHAPES, *SQUEEZES), _reshape),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), _permute),
    **dict.fromkeys((aten.cat.default, aten.stack.default), _cat),
    **dict.fromkeys((*CREATES_LIKE, *CREATES_NEW), _created),
    **dict.fromkeys((aten.full.default, aten.zeros.default, aten.ones.default), _created),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, aten.mm.default), _matmul),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _norm),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _pad),
    aten.scaled_dot_product_attention.default: _attention,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
}


def _bound(node: Node) -> dict[str, Any]:
    """Return the arguments of a function of PyTorch by name."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    found |= dict(zip([a.name for a in schema], node.args, strict=False))
    return found | dict(node.kwargs)
