"""The steps of a plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.fx import Node

from .layer import Layer
from .planes import Planes
from .recurrent import Direction
from .taps import Taps


@dataclass(eq=False)
class Torch:
    """A function of PyTorch, or a dense layer.

    Attributes:
        node: its node in the graph.

    Example:
        >>> from torch.fx import Graph
        >>> Torch(Graph().placeholder("x")).node
        x
    """

    node: Node

    @property
    def reads_size(self) -> bool:
        """Whether it reads only the size of its argument."""
        return self.node.target is torch.ops.aten.sym_size.int


@dataclass(eq=False)
class Copy:
    """Copies a value into planes, split into phases.

    Attributes:
        source: node of the value.
        out: planes; the channels of each phase follow those of the phase before.
        size: rows and columns of the source.
        stride: distance of the rows and columns of a phase.
        phases: first row and column of each phase.
        padding_value: value of the padding around images.

    Example:
        >>> from torch.fx import Graph
        >>> from torch_feather.runtime.planes import PlaneLayout
        >>> out = Planes(PlaneLayout(3, 4), 8, 3, 4, (8, 3, 4))
        >>> Copy(Graph().placeholder("x"), out, size=(3, 4)).phases
        ((0, 0),)
    """

    source: Node
    out: Planes
    size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    phases: tuple[tuple[int, int], ...] = ((0, 0),)
    padding_value: float = 0.0


@dataclass(eq=False)
class Sparse:
    """A sparse layer, from planes to planes.

    Attributes:
        layer: the layer.
        taps: its nonzero weights.
        x: input.
        out: result.
        residual: planes that are added to the result.

    Example:
        >>> import torch
        >>> from torch_feather.runtime.planes import PlaneLayout
        >>> layer = Layer("weight", torch.eye(4), torch.zeros(4))
        >>> x, out = (Planes(PlaneLayout(1, 1), 4, 1, 1, (4,), linear=True) for _ in range(2))
        >>> len(Sparse(layer, Taps.from_layer(layer), x, out).taps.values)
        4
    """

    layer: Layer
    taps: Taps
    x: Planes
    out: Planes
    residual: Planes | None = None


@dataclass(eq=False)
class Pointwise:
    """An elementwise function of PyTorch that maps 0 to 0, from planes to planes.

    Attributes:
        node: its node in the graph.
        x: inputs.
        out: result.

    Example:
        >>> from torch.fx import Graph
        >>> from torch_feather.runtime.planes import PlaneLayout
        >>> planes = Planes(PlaneLayout(3, 4), 8, 3, 4, (8, 3, 4))
        >>> Pointwise(Graph().placeholder("x"), (planes,), planes).out.channels
        8
    """

    node: Node
    x: tuple[Planes, ...]
    out: Planes


@dataclass(eq=False)
class Operation:
    """An operation in machine code that is no convolution, from planes to planes.

    Attributes:
        name: "mean", "scale", "scale_pixels", "activate", "layer_norm", "softmax", "log_softmax",
            "group_norm", "interleave", "repeat", "gather", "rows", "columns", "max_rows",
            "max_columns", "add", "subtract" or "multiply".
        x: inputs.
        out: result.
        activation: function of "activate", one of `kernels.ACTIVATIONS`.
        weight: of a norm, (channels,); of "scale_pixels", (height, width); of "rows" and "columns",
            see `resampling.ResamplingTaps`.
        bias: of a norm, (channels,).
        eps: of a norm.
        groups: of "group_norm".
        stride: rows and columns of the result per row and column of the input, of "interleave" and
            "repeat".
        index: int32 (groups, tokens) of "gather": which token of the input is at each place. The
            result has all channels of the input once for each group. Of "rows" and "columns": see
            `resampling.ResamplingTaps`.

    Example:
        >>> from torch_feather.runtime.planes import PlaneLayout
        >>> x = Planes(PlaneLayout(3, 4), 8, 3, 4, (8, 3, 4))
        >>> Operation("mean", (x,), Planes(PlaneLayout(1, 1), 8, 1, 1, (8, 1, 1))).eps
        0.0
    """

    name: str
    x: tuple[Planes, ...]
    out: Planes
    activation: str | None = None
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    eps: float = 0.0
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    index: np.ndarray | None = None


@dataclass(eq=False)
class Recurrence:
    """All steps in time of a layer of an LSTM or GRU, from planes to planes.

    The value of its node consists of the final states of all layers, after a None for the result.

    Attributes:
        node: its node in the graph.
        cell: "lstm" or "gru".
        directions: weights of each direction.
        x: products of the input with the weights, for each direction.
        out: result; the units of the second direction follow those of the first.
        states: nodes of the initial states: h and, for an LSTM, c.
        number: number of the layer.
        layers: number of layers of the node.
        steps: steps in time.
        batch_first: whether the steps of a sample are adjacent.

    Example:
        >>> from torch.fx import Graph
        >>> from torch_feather.runtime.planes import PlaneLayout
        >>> planes = Planes(PlaneLayout(1, 7), 8, 1, 7, (7, 8), linear=True)
        >>> Recurrence(Graph().placeholder("x"), "lstm", (), (), planes, (), 0, 1, 7, True).steps
        7
    """

    node: Node
    cell: str
    directions: tuple[Direction, ...]
    x: tuple[Planes, ...]
    out: Planes
    states: tuple[Node, ...]
    number: int
    layers: int
    steps: int
    batch_first: bool


@dataclass(eq=False)
class Attention:
    """Scaled dot-product attention of tokens in planes; a head is some consecutive channels.

    Attributes:
        x: queries, keys and values.
        out: result.
        heads: number of heads.
        queries: number of queries of a sequence.
        keys: number of keys of a sequence.
        scale: factor of the products of queries and keys.
        is_causal: whether a query attends to no key after it.
        mask: node of the mask, which can be broadcast to the scores.
        dims: dimensions of the scores before queries and keys, see `records.heads_second`.

    Example:
        >>> from torch_feather.runtime.planes import PlaneLayout
        >>> x = Planes(PlaneLayout(1, 9), 8, 1, 9, (9, 8), linear=True, tokens=((0, 1), (9, 0)))
        >>> Attention((x, x, x), x, heads=2, queries=9, keys=9, scale=0.5).mask is None
        True
    """

    x: tuple[Planes, Planes, Planes]
    out: Planes
    heads: int
    queries: int
    keys: int
    scale: float
    is_causal: bool = False
    mask: Node | None = None
    dims: int = 2


Step = Torch | Copy | Sparse | Pointwise | Operation | Attention | Recurrence
