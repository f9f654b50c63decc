"""Values that are views of tokens in planes, such as the heads of attention.

Between its projections, attention splits channels into heads, and permutes dimensions. Such a
function moves no value in planes, but its result is not a value in planes either: its channels may
be several dimensions, or not the last one. `TokenViews` follows these values until a function
computes in planes again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from .dimensions import CHANNEL, Dimensions, applied
from .heads import Heads, arguments_of, heads_of, is_periodic
from .layer import Layer
from .planes import PlaneLayout, Planes
from .sizes import sizes_of
from .steps import Attention, Operation, Sparse
from .taps import Taps
from .token_orders import order_of, rolled

aten = torch.ops.aten
PROBES = (2, 3)  # batch sizes for which strides are computed


class TokenView(NamedTuple):
    """A view of tokens in planes.

    Attributes:
        planes: the planes.
        values: for each probed batch size, the dimensions. Strides are numbers of tokens;
            consecutive channels have the distance `CHANNEL`.
        order: int32, position of each token of a sample in the planes, if strides are those of
            other positions, as after a cyclic shift.

    Example:
        >>> x = Planes(PlaneLayout(1, 9), 8, 1, 9, (9, 8), linear=True, tokens=((0, 1), (9, 0)))
        >>> view_of_tokens(x, batches=(2,)).values[0].shape
        (2, 9, 8)
    """

    planes: Planes
    values: tuple[Dimensions, ...]
    order: np.ndarray | None = None


def view_of_tokens(planes: Planes, batches: Sequence[int]) -> TokenView:
    """Return the view that consists of all tokens, with channels as the last dimension.

    Args:
        planes: of tokens.
        batches: batch sizes for which strides are computed.

    Example:
        >>> x = Planes(PlaneLayout(1, 9), 8, 1, 9, (9, 8), linear=True, tokens=((0, 1), (9, 0)))
        >>> view_of_tokens(x, batches=(2,)).values[0].merged(0, 1)
        [(18, 1)]
    """
    assert planes.tokens is not None
    values = []
    for batch in batches:
        sizes = [constant + slope * batch for constant, slope in planes.tokens]
        strides = [1]
        for n in reversed(sizes[1:]):
            strides.append(strides[-1] * n)
        shape = (*sizes, planes.channels)
        values.append(Dimensions.strided(shape, (*strides[::-1], CHANNEL)))
    return TokenView(planes, tuple(values))


class TokenViews:
    """Follows the values of a graph that are views of tokens in planes.

    Args:
        planes: planes of the values so far.
        batch: size or symbol of the batch.

    Example:
        >>> TokenViews({}, batch=1).pending
        {}
    """

    def __init__(self, planes: Mapping[Node, Planes], batch: Any) -> None:
        self._planes, self._batch = planes, batch
        self._batches = (batch,) if isinstance(batch, int) else PROBES
        self.pending: dict[Node, Any] = {}  # views, or lists of them
        self.copied: dict[Node, Planes] = {}  # planes of values that PyTorch computed

    def add(self, node: Node) -> bool | Planes:
        """Follow a function whose argument is a view.

        Returns:
            Its planes if it returns tokens with channels as the last dimension; otherwise whether
            it returns another view.
        """
        found = self._applied(node, self._view(node.args[0] if node.args else None))
        if isinstance(found, TokenView) and (planes := self._tokens(node, found)) is not None:
            return planes
        if found is not None:
            self.pending[node] = found
        return found is not None

    def attention(self, node: Node) -> Attention | None:
        """Return the step of scaled dot-product attention; None if PyTorch computes it.

        Its users must return tokens with channels as the last dimension in the end.
        """
        arguments = arguments_of(node)
        q, k, v = (self._heads_of(self._view(n)) for n in node.args[:3])
        if arguments is None or q is None or k is None or v is None:
            return None
        depth = q.planes.channels // q.heads
        if (k.heads, k.planes.channels) != (q.heads, q.planes.channels) or k[1:] != v[1:]:
            return None
        if not q.sequences == k.sequences == v.sequences:
            return None
        width, channels = q.planes.width, v.planes.channels
        layout = PlaneLayout(1, width, is_fixed=True)
        layout.merge(q.planes.layout)
        out = replace(q.planes, layout=layout, channels=channels, base=None, first=0)
        out.shape = (width, channels)
        view, shape = self._attended(node, out, q.heads), node.meta["val"].shape
        mask, is_causal, scale = arguments
        if view is None or not self._ends_in_tokens(node, view):
            return None
        if mask is not None and not is_periodic(mask.meta["val"], shape):
            return None
        self.pending[node] = view
        scale = depth**-0.5 if scale is None else float(scale)
        x, sizes = (q.planes, k.planes, v.planes), (q.tokens, k.tokens)
        return Attention(x, out, q.heads, *sizes, scale, is_causal, mask, len(shape) - 2)

    def layer(self, node: Node, layer: Layer) -> Sparse | None:
        """Return the step of a linear layer whose input is a permutation of tokens.

        The layer computes the tokens in the order of memory. Its users must return tokens with
        channels as the last dimension in the end.
        """
        view = self.pending.get(node.args[0])  # type: ignore[arg-type]
        if not isinstance(view, TokenView) or not layer.linear or len(node.args) > 1:
            return None
        firsts = {_first_channel(x, layer.channels[0]) for x in view.values}
        if None in firsts or len(firsts) != 1:
            return None
        (first,) = firsts
        assert first is not None
        inside, outside = layer.channels
        x = view.planes.channels_from(first, inside)
        layout = PlaneLayout(1, x.width, is_fixed=True)
        layout.merge(x.layout)
        out = replace(x, layout=layout, channels=outside, base=None, first=0)
        out.shape = (*x.shape[:-1], outside)
        result = self._of_layer(view, layer, out)
        if not self._ends_in_tokens(node, result):
            return None
        self.pending[node] = result
        return Sparse(layer, Taps.from_layer(layer), x, out)

    def _of_layer(self, view: TokenView, layer: Layer, out: Planes) -> TokenView:
        """Return the view of the result of a layer."""
        channel = ((layer.channels[1], CHANNEL),)
        values = tuple(Dimensions(0, (*x.parts[:-1], channel)) for x in view.values)
        return TokenView(out, values, view.order)

    def _attended(self, node: Node, out: Planes, heads: int) -> TokenView | None:
        """Return the view (..., token, channel) of the result of attention."""
        whole, values = view_of_tokens(out, self._batches), []
        sizes = sizes_of(node.meta["val"].shape, self._batch)
        for x, batch in zip(whole.values, self._batches, strict=True):
            count, tokens, channels = x.parts
            (depth,) = (size // heads for size, _ in channels)
            head = ((heads, depth * CHANNEL),)
            found = Dimensions(0, (count, head, tokens, ((depth, CHANNEL),)))
            shape = None if sizes is None else [c + slope * batch for c, slope in sizes]
            result = None if shape is None else found.reshaped(shape)
            if result is None:
                return None
            values.append(result)
        return TokenView(out, tuple(values))

    def _view(self, node: Any) -> Any:
        if not isinstance(node, Node):
            return None
        if node in self.pending:
            return self.pending[node]
        planes = self.copied.get(node) or self._planes.get(node)
        if planes is None or planes.tokens is None:
            return None
        return view_of_tokens(planes, self._batches)

    def _applied(self, node: Node, view: Any) -> Any:
        """Return the view, or the list of views, that a function returns; None if it copies."""
        if view is None:
            return None
        if node.target is operator.getitem:
            index = node.args[1]
            return view[index] if isinstance(view, list) and isinstance(index, int) else None
        if not isinstance(view, TokenView):
            return None
        value = node.meta["val"]
        sizes = sizes_of(value.shape, self._batch) if isinstance(value, Tensor) else None
        if node.target is aten.roll.default:
            return self._rolled(node, view)
        found = []
        for x, batch in zip(view.values, self._batches, strict=True):
            shape = None if sizes is None else [c + slope * batch for c, slope in sizes]
            found.append(applied(node, x, shape))
        if all(isinstance(x, Dimensions) for x in found):
            return TokenView(view.planes, tuple(found), view.order)
        if any(not isinstance(x, list) or None in x for x in found):
            return None
        return [TokenView(view.planes, parts, view.order) for parts in zip(*found, strict=True)]

    def _rolled(self, node: Node, view: TokenView) -> TokenView | None:
        """Return the view of a cyclic shift of tokens."""
        shifts: Any
        dims: Any
        _, shifts, dims = (*node.args, [])[:3]
        if any(not isinstance(n, int) for n in shifts):
            return None
        values, orders = [], []
        for x, batch in zip(view.values, self._batches, strict=True):
            order = rolled(x, shifts, dims, batch, view.planes.width)
            if order is None:
                return None
            orders.append(order)
            strides = [CHANNEL, 1]
            for n in x.shape[-2:0:-1]:
                strides.append(strides[-1] * n)
            values.append(Dimensions(x.offset, Dimensions.strided(x.shape, strides[::-1]).parts))
        if any(not np.array_equal(order, orders[0]) for order in orders):
            return None
        order = orders[0] if view.order is None else view.order[orders[0]]
        return TokenView(view.planes, tuple(values), order)

    def gathered(self, node: Node, empty: Callable[..., Planes]) -> Operation | None:
        """Return the step that copies a view of all tokens into planes in its order.

        Args:
            node: the view.
            empty: function that returns new planes for the value of a node.
        """
        view = self.pending.get(node)
        if not isinstance(view, TokenView) or len(node.meta["val"].shape) < 2:
            return None
        order = order_of(view.values, self._batches, view.planes.width)
        if order is None:
            return None
        out = empty(node, linear=True)
        if out.width != order.table.shape[1] or out.tokens is None:
            return None
        x = view.planes.channels_from(order.first, order.channels)
        return Operation("gather", (x,), out, index=order.after(view.order).table)

    def _tokens(self, node: Node, view: TokenView) -> Planes | None:
        """Return the planes of a view if its last dimension is channels and the others tokens."""
        value, found = node.meta["val"], set()
        if view.order is not None:
            return None
        for x, batch in zip(view.values, self._batches, strict=True):
            rank = len(x.parts)
            channels = x.shape[-1] if rank > 1 else 0
            first = _first_channel(x, channels)
            count = view.planes.width * batch
            if first is None or x.merged(*range(rank - 1)) != [(count, 1)][: count > 1]:
                return None
            found.add((first, channels))
        tokens = sizes_of(value.shape[:-1], self._batch)
        if len(found) != 1 or tokens is None:
            return None
        ((first, channels),) = found
        planes = view.planes.channels_from(first, channels)
        sample = (channels,) if value.dim() == 2 else (planes.width, channels)
        return replace(planes, tokens=tokens, shape=sample)

    def _heads_of(self, view: Any) -> Heads | None:
        """Return the heads of a view (..., token, channel), whose other dimensions end in heads."""
        if not isinstance(view, TokenView) or view.order is not None:
            return None
        found = set()
        for x, batch in zip(view.values, self._batches, strict=True):
            heads = heads_of(x)
            first, rest = divmod(x.offset, CHANNEL)
            if heads is None or rest or heads[1] * heads[2] != view.planes.width * batch:
                return None
            found.add((first, heads[0], *x.shape[-2:]))
            count = heads[1]
        if len(found) != 1:
            return None
        ((first, number, tokens, depth),) = found
        is_whole = view.planes.width % tokens == 0
        if not is_whole and not isinstance(self._batch, int):
            return None
        sequences = (0, view.planes.width // tokens) if is_whole else (count, 0)
        planes = view.planes.channels_from(first, number * depth)
        shape = (planes.width, planes.channels)
        planes = replace(planes, tokens=(sequences, (tokens, 0)), shape=shape)
        return Heads(planes, number, tokens, sequences)

    def _ends_in_tokens(self, node: Node, view: Any) -> bool:
        """Return whether all users of a view return tokens in the end."""
        for user in node.users:
            found = self._applied(user, view) if user.op == "call_function" else None
            if user.target is aten.scaled_dot_product_attention.default:
                if user.args[0] is not node:
                    continue  # keys, values or a mask; the queries decide
                found = view if self._heads_of(view) else None
            elif isinstance(user.target, Layer) and isinstance(view, TokenView):
                found = self._of_layer(view, user.target, view.planes)
            if found is None or user.args[0] is not node:
                return False
            is_end = isinstance(found, TokenView) and self._tokens(user, found) is not None
            if not is_end and not self._ends_in_tokens(user, found):
                return False
        return True


def _first_channel(x: Dimensions, channels: int) -> int | None:
    """Return the first channel of dimensions whose last one is channels of all tokens.

    Returns:
        None if the last dimension is something else, or tokens are missing or repeated.
    """
    first, rest = divmod(x.offset, CHANNEL)
    if rest or not channels or x.merged(len(x.parts) - 1) != [(channels, CHANNEL)][: channels > 1]:
        return None
    expected = 1
    for size, stride in sorted(x.merged(*range(len(x.parts) - 1)), key=lambda part: part[1]):
        if stride != expected:
            return None
        expected *= size
    return first
