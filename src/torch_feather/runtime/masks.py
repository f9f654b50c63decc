"""Masks of attention that a model writes out: what is added to its scores, or replaces them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .aliases import RESHAPES, SAME
from .readers import Constants

aten = torch.ops.aten
LARGEST = torch.finfo(torch.float32).max
# Scores that are added to such a number, and smaller than 1e22, do not change it.
ABSORBS = -1e30
VIEWS = (*SAME, *RESHAPES, aten.expand.default, aten.transpose.int, aten.permute.default)
CONVERSIONS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
WHERES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)


class Mask(NamedTuple):
    """One of the masks of a product of queries and keys.

    Attributes:
        node: numbers that are added; or a condition, if `number` is given.
        leading: sizes of the scores without the last two.
        number: what scores are replaced by.
        fills: the condition for which they are.

    Example:
        >>> Mask(Graph().placeholder("mask"), ["2"]).number is None
        True
    """

    node: Node
    leading: list[str]
    number: float | None = None
    fills: bool = True


class Masks:
    """All masks of a product of queries and keys.

    Args:
        constants: values of the nodes that do not depend on the input.
        added: the masks in their order.

    Example:
        >>> Masks({}).leave_keys()
        True
    """

    def __init__(self, constants: Constants, added: tuple[Mask, ...] = ()) -> None:
        self.constants, self.added = constants, added

    def plus(self, mask: Node, leading: list[str]) -> Masks:
        """Return these masks and one that is added."""
        return Masks(self.constants, (*self.added, Mask(mask, leading)))

    def filled(
        self, condition: Node, number: float, fills: bool, leading: list[str]
    ) -> Masks | None:
        """Return these masks and a number that replaces scores; None if it cannot be added.

        Args:
            condition: of bool.
            number: the number.
            fills: where the condition has this value, scores are replaced.
            leading: sizes of the scores without the last two.
        """
        if number > ABSORBS or (self.added and number != -math.inf):
            return None
        return Masks(self.constants, (*self.added, Mask(condition, leading, number, fills)))

    def leave_keys(self) -> bool:
        """Return whether each query is known to have a key whose score stays finite."""
        known, lowest = torch.zeros(1, 1), 0.0
        for mask in self.added:
            value = self._value(mask)
            if value is not None:
                known = known + value
                continue
            bounds = self._bounds(mask.node) if mask.number is None else (mask.number, 0.0)
            if bounds is None or bounds[1] > LARGEST:
                return False
            lowest += bounds[0]
        if known.isnan().any() or (known > LARGEST).any():
            return False
        return bool((known.double() + lowest >= -LARGEST).any(-1).all())

    def fit(self, leading: list[str]) -> bool:
        """Return whether all masks can be broadcast to scores with these sizes and two more."""
        for mask in self.added:
            sizes = [str(n) for n in mask.node.meta["val"].shape[:-2]]
            while sizes[:1] == ["1"]:
                sizes.pop(0)
            count = len(sizes)
            if count and mask.leading[-count:] != leading[-count:]:
                return False
        return True

    def combined(self, graph: Graph) -> tuple[Node | None, bool]:
        """Add the functions of the sum of all masks.

        Returns:
            The mask, and whether each query has the keys up to its own instead.
        """
        if not self.added:
            return None, False
        values = [self._value(mask) for mask in self.added]
        if all(v is not None for v in values) and _is_causal(sum(values)):  # type: ignore[arg-type]
            return None, True
        total = None
        for mask in self.added:
            node = mask.node
            if mask.number is not None:
                node = _numbers(graph, mask)
            if total is None:
                total = node
                continue
            a, b = total.meta["val"], node.meta["val"]
            total = graph.call_function(aten.add.Tensor, (total, node))
            total.meta["val"] = aten.add.Tensor(a, b)
        return total, False

    def _value(self, mask: Mask) -> Tensor | None:
        """Return the numbers that a constant mask adds."""
        value = self.constants.get(mask.node)
        if value is None or mask.number is None:
            return value
        condition = value if mask.fills else ~value
        return torch.zeros(value.shape).masked_fill_(condition, mask.number)

    def _bounds(self, node: Any) -> tuple[float, float] | None:
        """Return the least and the largest number that a value may have."""
        if isinstance(node, int | float):
            return float(node), float(node)
        value = self.constants.get(node)
        if value is not None:
            least, largest = (float(v) for v in value.aminmax()) if value.numel() else (0.0, 0.0)
            return None if math.isnan(least + largest) else (least, largest)
        args: list[Any] = [*node.args, None]
        if node.target in (*VIEWS, *CONVERSIONS):
            source = args[0].meta["val"].dtype
            return (0.0, 1.0) if source == torch.bool else self._bounds(args[0])
        parts: list[Any] = []
        if node.target in WHERES:
            parts = [self._bounds(a) for a in args[1:3]]
        elif node.target in FILLS:
            parts = [self._bounds(args[0]), self._bounds(args[2])]
        if not parts or None in parts:
            return None
        return min(low for low, _ in parts), max(high for _, high in parts)


def _numbers(graph: Graph, mask: Mask) -> Node:
    """Add the functions of the numbers that are added instead of replacing scores."""
    condition, number = mask.node, mask.number
    kind: dict[str, Any] = {"dtype": torch.float32}
    zeros = graph.call_function(aten.zeros_like.default, (condition,), kind)
    value = condition.meta["val"]
    zeros.meta["val"] = value.new_empty(value.shape, dtype=torch.float32)
    if not mask.fills:
        condition = graph.call_function(aten.logical_not.default, (condition,))
        condition.meta["val"] = value
    node = graph.call_function(aten.masked_fill.Scalar, (zeros, condition, number))
    node.meta["val"] = zeros.meta["val"]
    return node


def _is_causal(mask: Tensor) -> bool:
    """Return whether a mask leaves the keys up to the query, with the same numbers for all."""
    n = mask.shape[-1]
    if mask.dim() < 2 or mask.shape[-2] != n:
        return False
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    return bool((mask[..., ~later] == 0).all() and (mask[..., later] <= ABSORBS).all())
