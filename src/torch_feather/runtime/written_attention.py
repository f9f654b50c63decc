"""Attention that a model writes out as products and a softmax, as one function of PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .aliases import RESHAPES, SAME
from .masks import Masks
from .readers import Constants

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
VIEWS = (*SAME, *RESHAPES, aten.expand.default)
SCALES = (aten.mul.Tensor, aten.div.Tensor)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
WHERES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)


def replace_attention(graph: Graph, constants: Constants) -> None:
    """Replace softmax(scale · q kᵀ + mask) v by `scaled_dot_product_attention`.

    If all keys of a query are masked by -inf, that function returns 0, and a softmax NaN. So
    attention is only replaced if its mask is known to leave keys to all queries. Neither is it if
    something else reads its probabilities.

    Args:
        graph: exported; it is modified.
        constants: values of the nodes that do not depend on the input.

    Example:
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, q, k, v):
        ...         return torch.softmax(q @ k.transpose(-2, -1) / 2, dim=-1) @ v
        >>> x = torch.ones(2, 3, 4)
        >>> graph = torch.export.export(Attention(), (x, x, x)).module().graph
        >>> replace_attention(graph, {})
        >>> [str(n.target) for n in graph.nodes if n.op == "call_function"]
        ['aten.scaled_dot_product_attention.default']
    """
    for node in list(graph.nodes):
        scores = _scores_of(node, constants) if node.target in PRODUCTS else None
        if scores is not None:
            with graph.inserting_before(node):
                new = _attention(graph, node, scores)
            if new is not None:
                node.replace_all_uses_with(new)
    graph.eliminate_dead_code()


class Scores(NamedTuple):
    """Scores of attention.

    Attributes:
        q: queries.
        keys: transposed keys.
        scale: factor of their product.
        masks: what is added, or replaces scores.
        view: the scores in the shape with most dimensions.

    Example:
        >>> graph = Graph()
        >>> q, k = graph.placeholder("q"), graph.placeholder("k")
        >>> Scores(q, k, 0.5, Masks({}), q).scale
        0.5
    """

    q: Node
    keys: Node
    scale: float
    masks: Masks
    view: Node


def _scores_of(node: Node, constants: Constants) -> Scores | None:
    """Return the scores of attention whose result a node is; None if it is something else."""
    if not (_is_single(node) and all(isinstance(a, Node) for a in node.args[:2])):
        return None
    p: Any
    values: Any
    p, values = node.args[:2]
    size = _last(p, 2)
    while p.target in VIEWS and _is_private(p) and _last(p, 2) == size:
        p = p.args[0]
    if p.target not in SOFTMAXES or not _is_private(p) or _last(p, 2) != size or p.kwargs:
        return None
    x, dim, *kind = p.args
    rank = p.meta["val"].dim()
    is_last = isinstance(dim, int) and dim % rank == rank - 1
    if not is_last or kind not in ([], [None], [False], [torch.float32]):
        return None
    found = _Reader(constants).scores(x)
    if found is None or _last(found.view, 2) != size:
        return None
    leading = [_leading(n) for n in (found.q, found.keys, values, node)]
    if any(n != leading[0] for n in leading):
        return None
    return found if found.masks.leave_keys() else None


class _Reader:
    """Reads scores from the softmax backwards.

    Args:
        constants: values of the nodes that do not depend on the input.
    """

    def __init__(self, constants: Constants) -> None:
        self.constants = constants

    def scores(self, x: Any) -> Scores | None:
        """Return the scores that a node computes, which nothing else reads."""
        if not isinstance(x, Node) or x in self.constants or not _is_private(x):
            return None
        if not _is_single(x):
            return None
        if x.target in PRODUCTS:
            return self._product(x, *x.args)
        if x.target is aten.baddbmm.default:
            return self._product_and_sum(x)
        if x.target in VIEWS:
            found = self.scores(x.args[0])
            if found is None or _last(x, 2) != _last(found.view, 2):
                return None
            more = x.meta["val"].dim() > found.view.meta["val"].dim()
            return found._replace(view=x) if more else found
        if x.target in SCALES:
            return self._scaled(x)
        if x.target is aten.add.Tensor and not x.kwargs:
            return self._sum(x)
        args: Any = x.args
        if x.target in FILLS and not x.kwargs:
            scores, condition, value = args
            return self._filled(x, scores, condition, value)
        if x.target in WHERES and not x.kwargs:
            condition, a, b = args
            return self._filled(x, a, condition, b, False) or self._filled(x, b, condition, a)
        return None

    def number(self, value: Any) -> float | None:
        """Return a number that is constant."""
        if isinstance(value, Node):
            found = self.constants.get(value)
            return float(found) if found is not None and found.dim() == 0 else None
        return float(value) if isinstance(value, int | float) else None

    def _factor(self, x: Any) -> tuple[Any, float]:
        """Return what a node multiplies by a number or divides by it, and the factor."""
        if isinstance(x, Node) and x.target in SCALES and not x.kwargs:
            pairs = (x.args, x.args[::-1]) if x.target is aten.mul.Tensor else (x.args,)
            for value, other in pairs:
                factor = self.number(other)
                if factor is not None and isinstance(value, Node):
                    return value, factor if x.target is aten.mul.Tensor else 1 / factor
        return x, 1.0

    def _product(self, x: Node, q: Any, keys: Any) -> Scores | None:
        q, factor = self._factor(q)
        keys, other = self._factor(keys)
        nodes = isinstance(q, Node) and isinstance(keys, Node)
        if not nodes or not (_is_single(q) and _is_single(keys)) or q.meta["val"].dim() < 3:
            return None
        return Scores(q, keys, factor * other, Masks(self.constants), x)

    def _product_and_sum(self, x: Node) -> Scores | None:
        added, q, keys = x.args
        found = self._product(x, q, keys)
        beta, alpha = (self.number(x.kwargs.get(name, 1)) for name in ("beta", "alpha"))
        if found is None or alpha is None or beta not in (0, 1):
            return None
        found = found._replace(scale=found.scale * alpha)
        return self._masked(x, found, added) if beta else found

    def _scaled(self, x: Node) -> Scores | None:
        value, factor = self._factor(x)
        found = None if value is x else self.scores(value)
        if found is None or found.masks.added:
            return None
        return found._replace(scale=found.scale * factor)

    def _sum(self, x: Node) -> Scores | None:
        scores: Any
        for scores, mask in (x.args, x.args[::-1]):
            found = self.scores(scores)
            if found is not None:
                return self._masked(x, found, mask) if _is_alike(x, scores) else None
        return None

    def _masked(self, x: Node, found: Scores, mask: Any) -> Scores | None:
        if not isinstance(mask, Node) or not _is_single(mask):
            return None
        masks = found.masks.plus(mask, _leading(x))
        return None if masks is None else found._replace(masks=masks)

    def _filled(
        self, x: Node, scores: Any, condition: Any, value: Any, fills: bool = True
    ) -> Scores | None:
        """Return scores that are replaced by a number where a condition equals `fills`."""
        number, found = self.number(value), self.scores(scores)
        if number is None or found is None or not isinstance(condition, Node):
            return None
        if not _is_alike(x, scores) or condition.meta["val"].dtype != torch.bool:
            return None
        masks = found.masks.filled(condition, number, fills, _leading(x))
        return None if masks is None else found._replace(masks=masks)


def _attention(graph: Graph, node: Node, scores: Scores) -> Node | None:
    """Add the function, in the shape in which masks can be broadcast; None if there is none."""
    q, keys, v = scores.q, scores.keys, node.args[1]
    assert isinstance(v, Node)
    leading, view = _leading(q), _leading(scores.view)
    if not scores.masks.fit(view):
        return None
    k = keys.args[0] if _is_transposed(keys) else _call(graph, aten.transpose.int, keys, -2, -1)
    assert isinstance(k, Node)
    sizes = None
    if view != leading:
        sizes, back = _sizes(scores.view), _sizes(q)
        if sizes is None or back is None:
            return None
        q, k, v = (
            _call(graph, aten.reshape.default, n, [*sizes[:-2], *n.meta["val"].shape[-2:]])
            for n in (q, k, v)
        )
    mask, is_causal = scores.masks.combined(graph)
    arguments = (q, k, v, mask, 0.0, is_causal)
    target = aten.scaled_dot_product_attention.default
    found = graph.call_function(target, arguments, {"scale": scores.scale})
    if sizes is None:
        found.meta["val"] = node.meta["val"]
        return found
    value = v.meta["val"]
    found.meta["val"] = value.new_empty((*q.meta["val"].shape[:-1], value.shape[-1]))
    assert back is not None
    result = _call(graph, aten.reshape.default, found, [*back[:-1], value.shape[-1]])
    result.meta["val"] = node.meta["val"]
    return result


def _is_transposed(node: Node) -> bool:
    """Return whether a function exchanges the last two dimensions of its argument."""
    rank = node.meta["val"].dim()
    dims: Any = node.args[1:]
    is_transpose = node.target is aten.transpose.int and {d % rank for d in dims} == {
        *range(rank - 2, rank)
    }
    return is_transpose or node.target is aten.mT.default


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    """Add a call, with its value as in `torch.export`."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]))
    return node


def _sizes(node: Node) -> list[Any] | None:
    """Return the sizes of a value as arguments of `reshape`; at most one of them is unknown."""
    value = node.meta["val"]
    if node.target in (aten.reshape.default, aten.view.default):
        sizes: Any = node.args[1]
        if all(isinstance(n, int) and n > 0 for n in value.shape[-2:]):
            return [*sizes[:-2], *value.shape[-2:]]
    unknown = [not isinstance(n, int) for n in value.shape]
    if sum(unknown) > 1 or any(unknown[-2:]):
        return None
    return [-1 if is_unknown else n for n, is_unknown in zip(value.shape, unknown, strict=True)]


def _is_private(node: Node) -> bool:
    """Return whether exactly one function reads a value."""
    return len(node.users) == 1 and next(iter(node.users)).op != "output"


def _is_single(node: Node) -> bool:
    """Return whether a value is a tensor of float32."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _leading(node: Node) -> list[str]:
    """Return all sizes but the last two, in a form that can be compared."""
    return [str(n) for n in node.meta["val"].shape[:-2]]


def _last(node: Node, count: int) -> list[str]:
    return [str(n) for n in node.meta["val"].shape[-count:]]


def _is_alike(a: Node, b: Node) -> bool:
    return [str(n) for n in a.meta["val"].shape] == [str(n) for n in b.meta["val"].shape]
