"""Which layers run sparse, and in what tiles: whatever takes the least time here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .bound import Bound, Workspace
from .kernels import Tile, tiles
from .layer import Layer
from .plan import Plan, Sparse
from .planes import Grid
from .timing import milliseconds


@dataclass(frozen=True)
class Choice:
    """How a layer runs, and why.

    Attributes:
        sparse: as such, or densely in PyTorch.
        tile: what is held in registers.
        sparsity: share of the layer's weights that is zero.
        dense_ms, sparse_ms: measured; None where it was not tried.
    """

    sparse: bool
    tile: Tile
    sparsity: float
    dense_ms: float | None = None
    sparse_ms: float | None = None


def choose(node: Node, layer: Layer, batch: int, threads: int, grid: Grid | None = None) -> Choice:
    """Time a layer both ways on random input of the size that it has in the graph.

    `grid`: that it has among other sparse layers, which may need more zeros around the images.
    """
    sparsity = layer.sparsity
    x, *residual = (_random(n, batch) for n in node.args if isinstance(n, Node))
    dense = milliseconds(lambda: layer(x, *residual))
    plan = alone(node, layer)
    (step,) = (s for s in plan.steps if isinstance(s, Sparse))
    if grid is not None:
        step.out.grid.require(grid.height, grid.width, grid.pad_y, grid.pad_x)
    wanted = {layer.name: tiles()[0]}
    bound = Bound(plan, {}, batch, wanted, threads)
    workspace = Workspace(bound)
    workspace(x, *residual)
    times: dict[Tile, float] = {}
    for tile in tiles():
        wanted[layer.name] = tile
        if bound.kernel(step)[0] == tile:  # fits
            run = partial(workspace.native([step]), workspace.slots)
            best = min(times.values(), default=math.inf)
            times[tile] = milliseconds(run, enough=2.0, hopeless=1.5 * best)
    fastest = min(times, key=times.__getitem__)
    return Choice(times[fastest] < dense, fastest, sparsity, dense, times[fastest])


def alone(node: Node, layer: Layer) -> Plan:
    """The plan of a network of one layer."""
    graph = Graph()
    inputs = []
    for i, given in enumerate(node.args):
        assert isinstance(given, Node)
        inputs.append(graph.placeholder(f"x{i}"))
        inputs[-1].meta["val"] = given.meta["val"]
    only = graph.call_function(layer, tuple(inputs))
    only.meta["val"] = node.meta["val"]
    graph.output(only)
    return Plan.of(graph, [layer])


def _random(node: Node, batch: int) -> Tensor:
    shape = (batch, *(int(n) for n in node.meta["val"].shape[1:]))
    generator = torch.Generator().manual_seed(0)  # the user's stays as it is
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
