"""Where the samples of a batch are in the values of a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from .aliases import RESHAPES
from .constants import CREATES, CREATES_NEW
from .sizes import size_of

aten = torch.ops.aten
SIZES = {aten.sym_size.int, operator.mul, operator.floordiv, operator.add, operator.sub}
TAKES_SIZES = {*RESHAPES, *CREATES, *CREATES_NEW, aten.expand.default}


class Rows(NamedTuple):
    """Where samples are in a value.

    Attributes:
        dim: the dimension. It consists of `outer` parts, and each of these of all samples.
        each: number of successive elements that belong to one sample.
        outer: number of parts.

    Example:
        >>> Rows(dim=0, each=4).per_sample
        4
    """

    dim: int
    each: int = 1
    outer: int = 1

    @property
    def per_sample(self) -> int:
        """Number of elements of the dimension that belong to one sample."""
        return self.outer * self.each

    def of_one(self, value: Tensor, batch: int) -> Tensor:
        """Return the part of a tensor that belongs to the first sample.

        Args:
            value: for a batch.
            batch: number of samples.
        """
        parts = value.unflatten(self.dim, (self.outer, batch, self.each))
        return parts.narrow(self.dim + 1, 0, 1).flatten(self.dim, self.dim + 2)


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


class MixedError(Exception):
    """A function is not known to keep samples apart.

    Example:
        >>> require(1 + 1 == 3)
        Traceback (most recent call last):
        torch_feather.runtime.samples.MixedError
    """


def require(is_kept_apart: object) -> None:
    """Raise an error unless samples are known to be kept apart.

    Args:
        is_kept_apart: whether they are.

    Raises:
        MixedError: they are not.

    Example:
        >>> require(True)
    """
    if not is_kept_apart:
        raise MixedError


class Follower:
    """Follows the samples through the functions of a graph.

    Args:
        constants: values of the nodes that do not depend on the input.
        batch: number of samples, at least 2, or its symbol.
        function: returns the rows of the result of a function, of this follower and a node.

    Attributes:
        rows: see `Samples`.
        shared: see `Samples`.

    Example:
        >>> follower = Follower({}, 2, lambda follower, node: Rows(0))
        >>> follower.per_sample(6), follower.per_sample(7)
        (3, None)
    """

    def __init__(
        self,
        constants: Mapping[Node, Any],
        batch: Any,
        function: Callable[[Follower, Node], Any],
    ) -> None:
        self.constants, self.batch, self._function = constants, batch, function
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
                require(self.rows.get(read) == Rows(0))
        elif node.op == "placeholder":
            self.rows[node] = self._checked(node.meta["val"], Rows(0))
        elif node.op == "call_function" and node.target in SIZES and not _is_tensor(node):
            self._sizes.add(node)
        else:
            require(
                (node.op == "call_function" and node.target in TAKES_SIZES)
                or not (self._sizes & {*node.all_input_nodes})
            )
            self.rows[node] = self._checked(node.meta["val"], self._function(self, node))

    def result(self) -> Samples:
        """Return all rows. A shared constant must be shared by all that read it."""
        for node in self.shared:
            for user in node.users:
                require(user in self.constants or (node, user) in self._readers)
        return Samples(self.rows, self.shared)

    def _checked(self, value: Any, rows: Any) -> Any:
        """Return the rows of a value; check its size."""
        if isinstance(value, tuple | list):
            each = rows if isinstance(rows, list) else [rows] * len(value)
            return [self._checked(v, r) for v, r in zip(value, each, strict=True)]
        require(isinstance(value, Tensor) and 0 <= rows.dim < value.dim())
        require(self.per_sample(value.shape[rows.dim]) == rows.per_sample)
        return rows

    def per_sample(self, size: Any) -> int | None:
        """Return the number of elements per sample; None if a size is no multiple of the batch."""
        if isinstance(self.batch, int):
            is_multiple = isinstance(size, int) and size % self.batch == 0
            return size // self.batch if is_multiple else None
        constant, slope = size_of(size, self.batch) or (1, 0)
        return slope if constant == 0 else None

    def of(self, node: Any) -> Any:
        """Return the rows of a value that must depend on the input."""
        require(isinstance(node, Node) and node in self.rows)
        return self.rows[node]

    def only(self, node: Node) -> Rows:
        """Return the rows of the first argument of a function; no other one depends on samples."""
        x: Any = node.args[0]
        rows = self.of(x)
        require(isinstance(rows, Rows))
        require(not any(n in self.rows or n in self.shared for n in node.all_input_nodes[1:]))
        return rows

    def share(self, user: Node, node: Node, rows: Rows) -> None:
        """Require a constant to be the same for all samples."""
        shape = node.meta["val"].shape
        if rows.dim < 0 or (isinstance(shape[rows.dim], int) and shape[rows.dim] == 1):
            return
        value = self.constants.get(node)
        require(self.per_sample(shape[rows.dim]) == rows.per_sample)
        require(isinstance(value, Tensor) and isinstance(self.batch, int))
        assert isinstance(value, Tensor)
        one = rows.of_one(value, self.batch).unflatten(rows.dim, (rows.outer, 1, rows.each))
        parts = value.unflatten(rows.dim, (rows.outer, self.batch, rows.each))
        require(torch.equal(parts, one.expand_as(parts)))
        require(self.shared.setdefault(node, rows) == rows)
        self._readers.add((node, user))

    def aligned(self, user: Node, operands: Sequence[Node], inner: int = 0) -> Rows:
        """Return the rows of a function whose operands are broadcast to each other.

        Args:
            user: the function.
            operands: those that are broadcast.
            inner: number of last dimensions that must not be the samples.
        """
        ranks = {n: n.meta["val"].dim() for n in operands}
        tagged = {n: self.rows[n] for n in operands if n in self.rows}
        found = {rows._replace(dim=ranks[n] - rows.dim) for n, rows in tagged.items()}
        require(len(found) == 1)
        (from_right,) = found
        require(from_right.dim > inner)

        def rows_of(rank: int) -> Rows:
            return from_right._replace(dim=rank - from_right.dim)

        for n in operands:
            if n not in self.rows:
                self.share(user, n, rows_of(ranks[n]))
        return rows_of(user.meta["val"].dim())


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor | tuple | list)
