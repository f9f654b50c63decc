"""LSTM and GRU layers: dense with PyTorch, and their nonzero weights for the sparse kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, Node

from .kernels import UNROLL
from .layer import Layer
from .memory import aligned_zeros, round_up
from .taps import Taps

aten = torch.ops.aten
FUNCTIONS: dict[Any, str] = {aten.lstm.input: "lstm", aten.gru.input: "gru"}
GATES = {"lstm": 4, "gru": 3}


@dataclass(eq=False)
class Recurrent:
    """An `nn.LSTM` or `nn.GRU`: all its layers and directions.

    Calling it computes it densely, with PyTorch.

    Args:
        name: name of its weights in the model, without "weight_ih_l0".
        kind: "lstm" or "gru".
        weights: as PyTorch passes them: input weight, recurrent weight, and their biases, for each
            direction of each layer.
        has_biases: whether there are biases.
        layers: number of layers.
        is_bidirectional: whether there are two directions.
        batch_first: whether samples are the first dimension of the input, and time the second.

    Example:
        >>> lstm = torch.nn.LSTM(3, 5)
        >>> layer = Recurrent("lstm", "lstm", lstm._flat_weights, True, 1, False, False)
        >>> state = torch.zeros(1, 2, 5)
        >>> layer(torch.ones(7, 2, 3), state, state)[0].shape
        torch.Size([7, 2, 5])
    """

    name: str
    kind: str
    weights: list[Tensor]
    has_biases: bool
    layers: int
    is_bidirectional: bool
    batch_first: bool
    packs: bool = field(default=False, init=False)
    pools: ClassVar[bool] = False
    kernel_form: ClassVar[None] = None  # it consists of several layers
    __name__: ClassVar[str] = "recurrent"  # torch.fx names functions by it

    def __call__(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of all steps, and the final states.

        Args:
            x: (batch, time, features) if `batch_first`, otherwise (time, batch, features).
            states: h and, for an LSTM, c: (layers · directions, batch, units).
        """
        sizes = self.has_biases, self.layers, 0.0, False, self.is_bidirectional, self.batch_first
        if self.kind == "lstm":
            found: tuple[Tensor, ...] = aten.lstm.input(x, list(states), self.weights, *sizes)
            return found
        found = aten.gru.input(x, *states, self.weights, *sizes)
        return found

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that tell what it computes, besides its weights, by name."""
        others = "name", "weights"
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.init if f.name not in others
        }

    @property
    def units(self) -> int:
        """Number of units of a direction."""
        return self.weights[1].shape[1]

    @property
    def directions(self) -> int:
        """Number of directions."""
        return 2 if self.is_bidirectional else 1

    @property
    def sparsity(self) -> float:
        """Fraction of the weights, without biases, that is zero."""
        found = [w for w in self.weights if w.dim() == 2]
        nonzero = sum(int(torch.count_nonzero(w)) for w in found)
        return 1.0 - nonzero / sum(w.numel() for w in found)

    def free_packed(self) -> None:
        """Do nothing: PyTorch keeps no packed weights."""

    @cached_property
    def parts(self) -> list[list[Direction]]:
        """The directions of each layer."""
        count = 4 if self.has_biases else 2
        groups = [self.weights[i : i + count] for i in range(0, len(self.weights), count)]
        each = [self._direction(*group) for group in groups]
        return [each[i : i + self.directions] for i in range(0, len(each), self.directions)]

    def _direction(
        self, w_input: Tensor, w: Tensor, b_input: Tensor | None = None, b: Tensor | None = None
    ) -> Direction:
        units, zeros = self.units, w.new_zeros(len(w))
        b_input, b = zeros if b_input is None else b_input, zeros if b is None else b
        own = zeros
        if self.kind == "gru":  # the reset gate multiplies the recurrent part of the last gate
            known = [b[: 2 * units], zeros[:units]]
            b, own = torch.cat(known), torch.cat([zeros[: 2 * units], b[2 * units :]])
        return Direction(Layer(self.name, w_input, b_input + b), Layer(self.name, w, own))


class Direction(NamedTuple):
    """One direction of a layer.

    Attributes:
        product: layer of the products of the input with all its weights.
        recurrent: layer of the products of h. Only the last gate of a GRU has a bias there.

    Example:
        >>> lstm = torch.nn.LSTM(3, 5)
        >>> layer = Recurrent("lstm", "lstm", lstm._flat_weights, True, 1, False, False)
        >>> layer.parts[0][0].product.channels
        (3, 20)
    """

    product: Layer
    recurrent: Layer

    @property
    def units(self) -> int:
        """Number of units."""
        return self.recurrent.channels[0]

    def tables(self, lanes: int) -> dict[str, np.ndarray]:
        """Return the arrays that a kernel reads, see `RECURRENCE`.

        There are four gates of `units` rows each. Those of a GRU are r, z, and the parts of n from
        the input and from h. The last one has no product with the input.

        Args:
            lanes: number of samples in memory.
        """
        found, units = Taps.from_layer(self.recurrent), self.units
        row, first_own = found.out, 3 * units
        if self.recurrent.channels[1] == 3 * units:
            row, first_own = row + units * (row >= 2 * units), 2 * units
        rows, section = 4 * units, round_up(units * lanes)
        counts = np.bincount(row, minlength=rows)
        padded = -(-counts // UNROLL) * UNROLL
        first = np.zeros(rows + 1, np.int32)
        np.cumsum(padded, out=first[1:])
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        place = first[row] + np.arange(len(row)) - starts[row]
        taps = aligned_zeros(2 * int(first[-1]), np.int32).reshape(-1, 2)
        taps[:, 0] = section  # a row of zeros
        taps[place, 0] = found.key * lanes  # a key is a unit
        taps[place, 1] = found.values.astype(np.float32).view(np.int32)
        gate, unit = np.divmod(np.arange(rows), units)
        at = (gate * section + unit * lanes).astype(np.int32)
        bias = np.ascontiguousarray(self.recurrent.bias[first_own:].numpy())
        return {"taps": taps, "first": first, "at": at, "bias": bias}


def fuse_recurrent(graph: Graph, constants: Mapping[Node, Tensor]) -> None:
    """Replace LSTM and GRU functions with constant weights by `Recurrent` nodes.

    Args:
        graph: the graph, which is modified.
        constants: values of the nodes that do not depend on the input.

    Example:
        >>> graph = Graph()
        >>> _ = graph.output(graph.placeholder("x"))
        >>> fuse_recurrent(graph, {})
    """
    uses = Counter[str]()
    for node in list(graph.nodes):
        if node.target in FUNCTIONS and (found := _read(node, constants)):
            uses[found.name] += 1
            if uses[found.name] > 1:  # shared weights
                found.name = f"{found.name}@{uses[found.name]}"
            with graph.inserting_before(node):
                states = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
                new = graph.call_function(found, (node.args[0], *states))
            new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _read(node: Node, constants: Mapping[Node, Tensor]) -> Recurrent | None:
    args: list[Any] = list(node.args)
    if node.kwargs or len(args) != 9 or not all(isinstance(w, Node) for w in args[2]):
        return None
    weights = [constants.get(w) for w in args[2]]
    _, _, nodes, has_biases, layers, _, trains, is_bidirectional, batch_first = args
    kind = FUNCTIONS[node.target]
    count = layers * (2 if is_bidirectional else 1) * (4 if has_biases else 2)
    if trains or len(weights) != count or any(w is None for w in weights):  # or it has projections
        return None
    known = [w for w in weights if w is not None]
    if {w.dtype for w in known} != {torch.float32}:
        return None
    name = str(nodes[0].target if nodes[0].op == "get_attr" else nodes[0].name)
    name = name.removesuffix("weight_ih_l0").rstrip("._") or kind
    return Recurrent(name, kind, known, has_biases, layers, is_bidirectional, batch_first)


def dimensions(layer: Recurrent, x: Tensor) -> tuple[Any, Any]:
    """Return the number of samples and of steps of an input.

    Example:
        >>> lstm = torch.nn.LSTM(3, 5)
        >>> layer = Recurrent("lstm", "lstm", lstm._flat_weights, True, 1, False, False)
        >>> dimensions(layer, torch.ones(7, 2, 3))
        (2, 7)
    """
    return (x.shape[0], x.shape[1]) if layer.batch_first else (x.shape[1], x.shape[0])


def can_run_recurrent(node: Node, batch: Any) -> bool:
    """Return whether a `Recurrent` node can run sparse.

    Its input must have the samples of the batch in the dimension of the samples, and a known number
    of steps and features.

    Args:
        node: the node.
        batch: size or symbol of the first dimension of the graph's input.

    Example:
        >>> lstm = torch.nn.LSTM(3, 5)
        >>> layer = Recurrent("lstm", "lstm", lstm._flat_weights, True, 1, False, False)
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> x.meta["val"] = torch.ones(7, 2, 3)
        >>> can_run_recurrent(graph.call_function(layer, (x,)), batch=2)
        True
    """
    layer, nodes = node.target, node.all_input_nodes
    values = [n.meta.get("val") for n in nodes]
    assert isinstance(layer, Recurrent)
    if any(not isinstance(v, Tensor) or v.dim() != 3 for v in values):
        return False
    if any(v.dtype != torch.float32 for v in values if v is not None):
        return False
    samples, steps = dimensions(layer, values[0])  # type: ignore[arg-type]
    is_known = isinstance(steps, int) and isinstance(values[0].shape[2], int)  # type: ignore[union-attr]
    return str(samples) == str(batch) and is_known and steps > 0
