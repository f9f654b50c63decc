"""Where the samples of a batch are in the values of a graph, and whether functions mix them.

A network may process a batch in parts only if no sample affects the result for another one. This
follows from the graph: each function must be known to keep samples apart in the dimension in which
they are. For all other functions and arguments, samples count as mixed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .aliases import RESHAPES, SPLITS
from .aliases import SAME as COPIES
from .constants import CREATES, CREATES_LIKE, CREATES_NEW
from .layer import Layer
from .recurrent import Recurrent
from .sizes import size_of

aten = torch.ops.aten
# Functions of the elements of the first argument, and of several, that PyTorch does not mark as such.
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
    **dict.fromkeys((aten.adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default), 4),
    **dict.fromkeys((aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec), 4),
    **dict.fromkeys((aten.upsample_bicubic2d.vec, aten.pixel_shuffle.default), 4),
    **dict.fromkeys((aten.pixel_unshuffle.default, aten.channel_shuffle.default), 4),
    **dict.fromkeys((aten.conv3d.default, aten.conv3d.padding, aten.conv_transpose3d.input), 5),
    **dict.fromkeys((aten.max_pool3d.default, aten.avg_pool3d.default), 5),
    **dict.fromkeys((aten.adaptive_avg_pool3d.default, aten.upsample_trilinear3d.vec), 5),
}
SQUEEZES = (aten.squeeze.dim, aten.squeeze.dims)
SIZES = {aten.sym_size.int, operator.mul, operator.floordiv, operator.add, operator.sub}
TAKES_SIZES = {*RESHAPES, *CREATES, *CREATES_NEW, aten.expand.default}


class Rows(NamedTuple):
    """Where samples are in a value.

    Attributes:
        dim: the dimension.
        each: number of successive elements of this dimension that belong to one sample.

    Example:
        >>> Rows(dim=0, each=4).each
        4
    """

    dim: int
    each: int = 1


class Samples(NamedTuple):
    """Where samples are in all values of a graph that keeps them apart.

    Attributes:
        rows: `Rows` of the values that depend on the input, a list of them for several values.
        shared: `Rows` of constants that repeat the same values for each sample.

    Example:
        >>> Samples({}, {}).shared
        {}
    """

    rows: dict[Node, Any]
    shared: dict[Node, Rows]


class _MixedError(Exception):
    """A function is not known to keep samples apart."""


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
        Rows(dim=0, each=1)
        >>> y.args = (x, 0)
        >>> samples_of(graph, {}, batch=2) is None
        True
    """
    if isinstance(batch, int) and batch < 2:
        return None
    follower = _Follower(constants, batch)
    try:
        for node in graph.nodes:
            follower.add(node)
        return follower.result()
    except _MixedError:
        return None


def _require(is_kept_apart: object) -> None:
    if not is_kept_apart:
        raise _MixedError


class _Follower:
    """Follows the samples through the functions of a graph."""

    def __init__(self, constants: Mapping[Node, Any], batch: Any) -> None:
        self.constants, self.batch = constants, batch
        self.rows: dict[Node, Any] = {}
        self.shared: dict[Node, Rows] = {}
        self._readers: set[tuple[Node, Node]] = set()  # of shared constants
        self._sizes: set[Node] = set()

    def add(self, node: Node) -> None:
        """Follow the samples through one more node."""
        if node.op == "get_attr" or node in self.constants:
            return
        if node.op == "output":
            for read in node.all_input_nodes:
                _require(self.rows.get(read) == Rows(0))
        elif node.op == "placeholder":
            self.rows[node] = self._checked(node.meta["val"], Rows(0))
        elif node.op == "call_function" and node.target in SIZES and not _is_tensor(node):
            self._sizes.add(node)
        else:
            _require(node.op == "call_function" and node.target in TAKES_SIZES or not (
                self._sizes & {*node.all_input_nodes}
            ))
            self.rows[node] = self._checked(node.meta["val"], self._function(node))

    def result(self) -> Samples:
        """Return all rows. A shared constant must be shared by all that read it."""
        for node in self.shared:
            for user in node.users:
                _require(user in self.constants or (node, user) in self._readers)
        return Samples(self.rows, self.shared)

    def _checked(self, value: Any, rows: Any) -> Any:
        """Return the rows of a value; check its size."""
        if isinstance(value, tuple | list):
            each = rows if isinstance(rows, list) else [rows] * len(value)
            return [self._checked(v, r) for v, r in zip(value, each, strict=True)]
        _require(isinstance(value, Tensor) and 0 <= rows.dim < value.dim())
        _require(self._per_sample(value.shape[rows.dim]) == rows.each)
        return rows

    def _per_sample(self, size: Any) -> int | None:
        """Return the number of elements per sample; None if a size is no multiple of the batch."""
        if isinstance(self.batch, int):
            is_multiple = isinstance(size, int) and size % self.batch == 0
            return size // self.batch if is_multiple else None
        constant, slope = size_of(size, self.batch) or (1, 0)
        return slope if constant == 0 else None

    def _function(self, node: Node) -> Any:
        """Return the rows of the result of a function."""
        target: Any = node.target
        if isinstance(target, Layer):
            return self._layer(node, target)
        if isinstance(target, Recurrent):
            return self._recurrent(node, target)
        if target is operator.getitem:
            return self._of(node.args[0])[node.args[1]]
        _require(isinstance(target, OpOverload) and not target._schema.is_mutable)
        is_random = torch.Tag.nondeterministic_seeded in target.tags
        _require(not is_random or target is aten.scaled_dot_product_attention.default)
        args = _bound(node)
        if target in SAME:
            return self._of(node.args[0])
        if torch.Tag.pointwise in target.tags or target in POINTWISE:
            return self._aligned(node, node.all_input_nodes)
        if target in ALONG | REDUCE:
            return self._along(node, args)
        if target in FIRST:
            return self._first(node, args)
        rule = RULES.get(target)
        _require(rule)
        assert rule is not None
        return rule(self, node, args)

    def _of(self, node: Any) -> Any:
        """Return the rows of a value that must depend on the input."""
        _require(isinstance(node, Node) and node in self.rows)
        return self.rows[node]

    def _only(self, node: Node) -> Rows:
        """Return the rows of the first argument of a function; no other one depends on samples."""
        x: Any = node.args[0]
        rows = self._of(x)
        _require(isinstance(rows, Rows))
        _require(not any(n in self.rows or n in self.shared for n in node.all_input_nodes[1:]))
        return rows  # type: ignore[no-any-return]

    def _share(self, user: Node, node: Node, rows: Rows) -> None:
        """Require a constant to be the same for all samples."""
        shape = node.meta["val"].shape
        if rows.dim < 0 or (isinstance(shape[rows.dim], int) and shape[rows.dim] == 1):
            return
        value = self.constants.get(node)
        _require(isinstance(value, Tensor) and self._per_sample(shape[rows.dim]) == rows.each)
        assert isinstance(value, Tensor)
        parts = value.unflatten(rows.dim, (self.batch, rows.each))
        _require(torch.equal(parts, parts.narrow(rows.dim, 0, 1).expand_as(parts)))
        _require(self.shared.setdefault(node, rows) == rows)
        self._readers.add((node, user))

    def _aligned(self, user: Node, operands: Sequence[Node], inner: int = 0) -> Rows:
        """Return the rows of a function whose operands are broadcast to each other.

        Args:
            user: the function.
            operands: those that are broadcast.
            inner: number of last dimensions that must not be the samples.
        """
        ranks = {n: n.meta["val"].dim() for n in operands}
        found = {(ranks[n] - self.rows[n].dim, self.rows[n].each) for n in operands if n in self.rows}
        _require(len(found) == 1)
        ((distance, each),) = found
        _require(distance > inner)
        for n in operands:
            if n not in self.rows:
                self._share(user, n, Rows(ranks[n] - distance, each))
        return Rows(user.meta["val"].dim() - distance, each)

    def _layer(self, node: Node, layer: Layer) -> Rows:
        rows, rank = self._of(node.args[0]), node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        if layer.linear:
            _require(rows.dim < rank - 1)
        else:
            _require(rows.dim == 0 and rank == layer.weight.dim())
        return self._aligned(node, node.all_input_nodes)

    def _recurrent(self, node: Node, layer: Recurrent) -> list[Rows]:
        x, *states = node.args
        rows = self._of(x)
        _require(rows.dim == (0 if layer.batch_first else 1) and x.meta["val"].dim() == 3)  # type: ignore[union-attr]
        own = Rows(1, rows.each)  # (layers, batch, units)
        for state in states:
            assert isinstance(state, Node)
            if state in self.rows:
                _require(self.rows[state] == own)
            else:
                self._share(node, state, own)
        return [rows, *[own] * (len(node.meta["val"]) - 1)]

    def _along(self, node: Node, args: Mapping[str, Any]) -> Rows:
        rows, rank = self._only(node), node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        given = args["dims"] if "dims" in args else args["dim"]
        dims = [given] if isinstance(given, int) else list(given or ())
        _require(dims)
        dims = [d % rank for d in dims]
        _require(rows.dim not in dims)
        if node.target in ALONG or args.get("keepdim"):
            return rows
        return Rows(rows.dim - sum(d < rows.dim for d in dims), rows.each)

    def _first(self, node: Node, args: Mapping[str, Any]) -> Rows:
        rows, rank = self._only(node), node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        _require(rows.dim == 0 and rank == (FIRST[node.target] or max(2, rank)))
        _require(not args.get("training"))  # a batch norm without fixed statistics
        return rows

    def _reshape(self, node: Node, _: Mapping[str, Any]) -> Rows:
        """Return the rows after a function that keeps the order of elements.

        The elements before the samples are `before` blocks, in each of which the elements of a
        sample are adjacent.
        """
        rows, x = self._of(node.args[0]), node.args[0].meta["val"]  # type: ignore[union-attr]
        if node.target in SQUEEZES:
            dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
            _require(rows.dim not in [d % x.dim() for d in dims])  # type: ignore[operator]
        before, seen = 1, 1
        for size in x.shape[: rows.dim]:
            _require(isinstance(size, int))
            before *= size
        for dim, size in enumerate(node.meta["val"].shape):
            if seen == before and not (isinstance(size, int) and size == 1):
                each = self._per_sample(size)
                _require(each is not None)
                return Rows(dim, each)  # type: ignore[arg-type]
            _require(isinstance(size, int))
            seen *= size
        raise _MixedError

    def _permute(self, node: Node, args: Mapping[str, Any]) -> Rows:
        rows, rank = self._only(node), node.meta["val"].dim()
        order = list(range(rank))
        if node.target is aten.permute.default:
            order = [d % rank for d in args["dims"]]
        else:
            a, b = (0, rank - 1) if node.target is aten.t.default else (args["dim0"], args["dim1"])
            order[a], order[b] = order[b], order[a]
        return Rows(order.index(rows.dim), rows.each)

    def _cat(self, node: Node, args: Mapping[str, Any]) -> Rows:
        tensors = args["tensors"]
        ranks = {n.meta["val"].dim() for n in tensors}
        _require(len(ranks) == 1)
        rank = ranks.pop() + (node.target is aten.stack.default)
        rows, dim = self._aligned_alike(node, tensors), args["dim"] % rank
        if node.target is aten.stack.default:
            return Rows(rows.dim + (dim <= rows.dim), rows.each)
        _require(dim != rows.dim)
        return rows

    def _aligned_alike(self, node: Node, tensors: Sequence[Node]) -> Rows:
        """Return the rows of tensors that all have the samples in the same dimension."""
        found = {self.rows[n] for n in tensors if n in self.rows}
        _require(len(found) == 1)
        (rows,) = found
        for n in tensors:
            if n not in self.rows:
                self._share(node, n, rows)
        return rows  # type: ignore[no-any-return]

    def _expand(self, node: Node, _: Mapping[str, Any]) -> Rows:
        x: Any = node.args[0]
        shape, added = node.meta["val"].shape, node.meta["val"].dim() - x.meta["val"].dim()
        if x in self.rows:
            return Rows(self.rows[x].dim + added, self.rows[x].each)
        own = [1] * added + list(x.meta["val"].shape)
        return self._filled([n for n, o in zip(shape, own, strict=True)], own)

    def _filled(self, shape: Sequence[Any], own: Sequence[Any] | None = None) -> Rows:
        """Return the rows of a value that is equal for all samples: one dimension is the batch."""
        found = [d for d, n in enumerate(shape) if not isinstance(n, int)]
        _require(not isinstance(self.batch, int) and len(found) == 1)
        (dim,) = found
        _require(own is None or (isinstance(own[dim], int) and own[dim] == 1))
        return Rows(dim, self._per_sample(shape[dim]) or 0)

    def _created(self, node: Node, args: Mapping[str, Any]) -> Rows:
        """Return the rows of a tensor of one number."""
        _require(not isinstance(args.get("fill_value"), Node))
        if node.target in CREATES_LIKE:
            return self._only(node)
        return self._filled(node.meta["val"].shape)

    def _repeat(self, node: Node, args: Mapping[str, Any]) -> Rows:
        rows, rank = self._only(node), node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        rows = Rows(rows.dim + len(args["repeats"]) - rank, rows.each)
        _require(args["repeats"][rows.dim] == 1)
        return rows

    def _norm(self, node: Node, args: Mapping[str, Any]) -> Rows:
        rows, rank = self._only(node), node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        _require(rows.dim < rank - len(args["normalized_shape"]))
        return rows

    def _pad(self, node: Node, args: Mapping[str, Any]) -> Rows:
        rows, rank = self._only(node), node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        _require(rows.dim < rank - len(args["pad"]) // 2)
        return rows

    def _linear(self, node: Node, _: Mapping[str, Any]) -> Rows:
        rows, rank = self._only(node), node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        _require(rows.dim < rank - 1)
        return rows

    def _embedding(self, node: Node, args: Mapping[str, Any]) -> Rows:
        _require(args["weight"] not in self.rows)
        rows = self._of(args["indices"])
        assert isinstance(rows, Rows)
        return rows

    def _matmul(self, node: Node, args: Mapping[str, Any]) -> Rows:
        a, b = node.args[:2]
        assert isinstance(a, Node)
        assert isinstance(b, Node)
        ranks = [n.meta["val"].dim() for n in (a, b)]
        _require(min(ranks) >= 2)
        if b not in self.rows and self._of(a).dim == ranks[0] - 2:  # samples are rows of a matrix
            return Rows(node.meta["val"].dim() - 2, self.rows[a].each)
        return self._aligned(node, [a, b], inner=2)

    def _attention(self, node: Node, args: Mapping[str, Any]) -> Rows:
        _require(args["dropout_p"] == 0.0)
        rows = self._aligned(node, node.all_input_nodes, inner=3 if args["enable_gqa"] else 2)
        _require(rows.dim == self._of(node.args[0]).dim or node.args[0] not in self.rows)
        return rows


Rule = Callable[[_Follower, Node, Mapping[str, Any]], Any]
RULES: dict[Any, Rule] = {
    **dict.fromkeys((*RESHAPES, *SQUEEZES), _Follower._reshape),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), _Follower._permute),
    **dict.fromkeys((aten.cat.default, aten.stack.default), _Follower._cat),
    **dict.fromkeys((*CREATES_LIKE, *CREATES_NEW), _Follower._created),
    **dict.fromkeys((aten.full.default, aten.zeros.default), _Follower._created),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, aten.mm.default), _Follower._matmul),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _Follower._norm),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _Follower._pad),
    aten.scaled_dot_product_attention.default: _Follower._attention,
    aten.expand.default: _Follower._expand,
    aten.repeat.default: _Follower._repeat,
    aten.linear.default: _Follower._linear,
    aten.embedding.default: _Follower._embedding,
}


def _bound(node: Node) -> dict[str, Any]:
    """Return the arguments of a function of PyTorch by name."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    found |= dict(zip([a.name for a in schema], node.args, strict=False))
    return found | dict(node.kwargs)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor | tuple | list)
