"""Tuning: which layers run sparse, with which tiles, as measured on this machine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .batch import BatchPlan
from .kernels import Tile, library
from .layer import Layer
from .memory import return_freed_memory
from .plan import Operation, Plan, Recurrence, Sparse, Torch
from .recurrent import Recurrent
from .sizes import sizes_of
from .timing import LONG, milliseconds
from .workspace import Workspace

CANDIDATES = 5  # number of tiles that are timed
RECURRENT_CANDIDATES = 2  # with whole recurrent layers, in which the tiles matter less
LARGE = 2_000_000  # bytes of a weight
HOPELESS = 10.0  # a dense layer that takes so many times as long is not tried with packed weights
LATENCY, GROUP_CYCLES = 3.0, 12.0  # cycles of a multiply-add that follows another; of a group
SAME_TAPS = 0.02  # relative difference of numbers of nonzero weights that changes no time


@dataclass(frozen=True)
class LayerTuning:
    """How a layer runs, and the times that this is based on.

    Attributes:
        sparse: whether the layer runs sparse; otherwise it runs densely in PyTorch.
        tile: tile of the sparse kernel: vectors of pixels, float32 values in a vector, and output
            channels.
        sparsity: fraction of the layer's weights that is zero.
        dense_ms: milliseconds of the dense layer; None if it was not timed.
        sparse_ms: milliseconds of the sparse layer; None if it was not timed.
        packs: whether a dense convolution stores its weights in oneDNN's own order.
        chunk_size: 1 if the network processes a batch one sample at a time, with which the layer
            was timed; None for the whole batch.

    Example:
        >>> LayerTuning(sparse=True, tile=Tile(2, 8), sparsity=0.9).tile.channels
        1
    """

    sparse: bool
    tile: Tile
    sparsity: float
    dense_ms: float | None = None
    sparse_ms: float | None = None
    packs: bool = True
    chunk_size: int | None = None


Tuning = Mapping[str, LayerTuning]


def tune_layer(
    node: Node,
    layer: Layer | Recurrent,
    batch: int,
    threads: int,
    place: Sparse | None = None,
    known: dict[Any, Any] | None = None,
) -> LayerTuning:
    """Time a layer densely and with some tiles, on random input.

    The tiles are those with the lowest estimated costs. A layer clearly faster sparse is timed
    densely once.

    Args:
        node: node of the layer.
        layer: the layer.
        batch: number of samples.
        threads: number of threads of the sparse kernels.
        place: its step in the network, whose planes may have more padding, or consist of phases.
        known: times of earlier layers, by their sizes. Layers of equal size have the same dense
            time, the same best tile if their sparsity is similar, and the same time with this tile
            if their numbers of nonzero weights are almost equal. Times are added.

    Returns:
        The faster way for this layer alone. The time of the whole network may favor the other one.

    Example:
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> x.meta["val"] = torch.ones(1, 4)
        >>> layer = Layer("weight", torch.eye(4), torch.zeros(4))
        >>> node = graph.call_function(layer, (x,))
        >>> node.meta["val"] = layer(torch.ones(1, 4))
        >>> tune_layer(node, layer, batch=1, threads=1).sparsity
        0.75
    """
    if isinstance(layer, Recurrent):
        return _tune_recurrent(node, layer, batch, threads)
    known, sparsity, symbol = {} if known is None else known, layer.sparsity, _batch_of(node.graph)
    values = [n.meta["val"] for n in (*node.args, node) if isinstance(n, Node)]
    if place is not None and place.out.phases > 1:
        symbol, values = (batch := batch * place.out.phases), _phases(place, batch)
    plan = _plan_of_layer(layer, values, symbol)
    step = _padded_like(plan, place)
    pixels, taps = step.out.pixels(batch), len(step.taps.values)
    sizes = [_size_of(value, symbol, batch) for value in values[:-1]]
    key = (*_size(layer), *sizes, pixels)
    similar, form = (*key, round(sparsity, 2)), step.layer
    timed: _Timed | None = known.get(similar)
    if timed is None or abs(taps - timed.taps) > SAME_TAPS * taps:
        zeros = sparsity if form is layer else 1 - taps / max(1, form.weight.numel())
        tiles = candidates(form, zeros, pixels) if timed is None else [timed.tile]
        x, *residual = inputs = [_random_input(size, known) for size in sizes]
        times = _time_tiles(plan, step, tiles, inputs, batch, threads)
        timed = known[similar] = _Timed(*min(times.items(), key=lambda item: item[1]), taps)
        if key not in known:
            known[key] = _time_dense(layer, x, residual, timed.sparse_ms), layer.packs
    tile, sparse, _ = timed
    dense, layer.packs = known[key]
    return LayerTuning(sparse < dense, tile, sparsity, dense, sparse, layer.packs)


class _Timed(NamedTuple):
    """The fastest tile of a layer, its time, and the number of taps."""

    tile: Tile
    sparse_ms: float
    taps: int


def _padded_like(plan: Plan, place: Sparse | None) -> Sparse:
    """Return the step of the only layer of a plan, with the padding that it has in the network."""
    (step,) = (s for s in plan.steps if isinstance(s, Sparse))
    if place is not None:
        layout = place.out.layout.root()
        step.out.layout.require(layout.height, layout.width, layout.pad_y, layout.pad_x)
    return step


def _time_tiles(
    plan: Plan,
    step: Sparse,
    tiles: Sequence[Tile],
    inputs: Sequence[Tensor],
    batch: int,
    threads: int,
) -> dict[Tile, float]:
    """Return the milliseconds of the only layer of a plan with each tile."""
    requested = {step.layer.name: tiles[0]}
    batch_plan = BatchPlan(plan, {}, batch, requested, threads)
    library().compile(batch_plan.variant(step, tile) for tile in tiles)
    workspace = Workspace(batch_plan)
    workspace(*inputs)
    times: dict[Tile, float] = {}
    channels = [tile.channels for tile in tiles]
    for tile in sorted(tiles, key=lambda tile: channels.index(tile.channels)):
        if tile.channels != requested[step.layer.name].channels:
            batch_plan.free_tables(step)  # of a large layer they are large, too
        requested[step.layer.name] = tile
        native = [s for s in plan.steps if isinstance(s, Sparse | Operation)]  # without copies
        run = partial(workspace.native(native), workspace.values)
        best = min(times.values(), default=math.inf)
        # The first call finds less in the caches, which matters less if it is long.
        behind = 1.5 if best < LONG else 1.2
        times[tile] = milliseconds(run, min_total=1.0, give_up=behind * best)
    return times


def _size(layer: Layer) -> tuple[Any, ...]:
    """Return what determines the times of a layer, besides its sparsity; bounds take no time."""
    options = [value for name, value in layer.options.items() if name not in ("low", "high")]
    return (type(layer).__name__, tuple(layer.weight.shape), *options)


def candidates(layer: Layer, sparsity: float, pixels: int) -> list[Tile]:
    """Return the tiles of a layer that are probably the fastest ones.

    The estimate counts cycles per tap: two multiply-adds, or two loads, at a time, and at least
    `LATENCY` cycles, since each sum waits for the one before.

    Args:
        layer: the layer.
        sparsity: fraction of its weights that is zero.
        pixels: of a channel, with the padding that is computed.

    Example:
        >>> layer = Layer("weight", torch.eye(4), torch.zeros(4))
        >>> len(candidates(layer, 0.75, pixels=16)) <= CANDIDATES
        True
    """
    out, positions = layer.channels[1], layer.weight[0].numel()
    most = out if layer.combine == "fma" else 1
    fitting = [
        t
        for t in library().tiles
        if t.vectors * t.width <= pixels and t.channels <= most and out % t.channels == 0
    ]

    def cost(tile: Tile) -> float:
        sums = tile.vectors * tile.channels
        shared = tile.channels if layer.groups == 1 else 1  # channels that read the same inputs
        taps = positions * (1 - sparsity**shared) * tile.channels / shared  # expected
        loads = tile.vectors + tile.channels + 1
        group = taps * max(LATENCY, sums / 2, loads / 2) + GROUP_CYCLES + 2 * sums
        count = -(-pixels // (tile.vectors * tile.width))
        return count * group * (out // tile.channels)

    return sorted(fitting, key=cost)[:CANDIDATES]


def _time_dense(layer: Layer, x: Tensor, residual: Sequence[Tensor], sparse_ms: float) -> float:
    """Return the milliseconds of a dense layer, with packed weights if these are faster.

    Weights are not packed if that cannot make the layer as fast as in the sparse way: it takes the
    memory of two copies of them.

    Args:
        layer: the layer; its `packs` is set.
        x: input.
        residual: what is added.
        sparse_ms: milliseconds of the sparse layer. If the first call takes far longer, it is the
            only one.
    """
    times = {}
    with layer.temporarily_folded():
        for layer.packs in (False, True):
            layer(x, *residual)
            run = partial(layer, x, *residual)
            times[layer.packs] = milliseconds(run, min_total=3.0, give_up=3 * sparse_ms)
            is_hopeless = layer.weight.nbytes > LARGE and times[False] > HOPELESS * sparse_ms
            if layer.linear or type(layer) is not Layer or is_hopeless:
                break
    if layer.weight.nbytes > LARGE:
        return_freed_memory()
    layer.packs = min(times, key=times.__getitem__)
    return times[layer.packs]


def distinct_ways(tuned: Tuning, sparse: Tuning, dense: Tuning) -> list[Tuning]:
    """Return the ways to run a network that may be the fastest and are not the same.

    If the layers are twice as fast in the sparse way, all of them densely is not faster.

    Args:
        tuned: each layer in its faster way.
        sparse: all layers that can run sparse.
        dense: no layer sparse.

    Example:
        >>> layer = LayerTuning(True, Tile(2, 8), 0.9, dense_ms=3.0, sparse_ms=1.0)
        >>> dense = LayerTuning(False, Tile(2, 8), 0.9, dense_ms=3.0, sparse_ms=1.0)
        >>> len(distinct_ways({"w": layer}, {"w": layer}, {"w": dense}))
        1
    """
    ways = [tuned]
    if any(sparse[name].sparse != layer.sparse for name, layer in tuned.items()):
        ways.append(sparse)
    times = [(t.dense_ms, t.sparse_ms) for t in tuned.values() if t.dense_ms and t.sparse_ms]
    dense_ms, best_ms = sum(d for d, _ in times), sum(min(d, s) for d, s in times)
    if any(t.sparse for t in tuned.values()) and dense_ms < 2 * best_ms:
        ways.append(dense)
    return ways


def table(tuning: Tuning, plan: Plan, chunk_size: int | None = None) -> str:
    """Return a table of the layers, their times, and how they run.

    Args:
        tuning: how each layer runs.
        plan: steps of the network.
        chunk_size: number of samples that the network processes together; None for whole batches.

    Example:
        >>> table({}, Plan(Graph()))
        'layer                                    sparsity   dense ms  sparse ms  runs'
    """
    lines = [f"{'layer':40} sparsity   dense ms  sparse ms  runs"]
    for name, layer in tuning.items():
        times = (layer.dense_ms, layer.sparse_ms)
        dense, sparse = (" " * 10 if t is None else f"{t:10.3f}" for t in times)
        how = f"sparse, {' x '.join(map(str, layer.tile))}" if layer.sparse else "dense"
        percent = f"{100 * layer.sparsity:.2f}%"
        lines.append(f"{name:40} {percent:>8} {dense} {sparse}  {how}")
    others = Counter(
        str(step.node.target).removeprefix("aten.")
        for step in plan.steps
        if isinstance(step, Torch) and not isinstance(step.node.target, Layer | Recurrent)
    )
    if others:
        counts = ", ".join(f"{n} x {name}" if n > 1 else name for name, n in others.items())
        lines.append(f"in PyTorch: {counts}")
    if chunk_size is not None:
        lines.append(f"batches: in chunks of {chunk_size}")
    return "\n".join(lines)


def _batch_of(graph: Graph) -> Any:
    """Return the size or symbol of the batch, the first dimension of a graph's input."""
    return next(n for n in graph.nodes if n.op == "placeholder").meta["val"].shape[0]


def _tune_recurrent(node: Node, layer: Recurrent, batch: int, threads: int) -> LayerTuning:
    """Time an LSTM or GRU densely, and sparsely with some tiles for the products of its inputs."""
    symbol = _batch_of(node.graph)
    values = [n.meta["val"] for n in (*node.args, node) if isinstance(n, Node)]
    x, *states = (_random_input(_size_of(v, symbol, batch), {}) for v in values[:-1])
    plan = _plan_of_layer(layer, values, symbol)
    if not any(isinstance(step, Recurrence) for step in plan.steps):
        return LayerTuning(False, library().tiles[0], layer.sparsity)
    product = layer.parts[0][0].product
    pixels = next(s for s in plan.steps if isinstance(s, Sparse)).out.pixels(batch)
    times: dict[Tile, float] = {}
    for tile in candidates(product, product.sparsity, pixels)[:RECURRENT_CANDIDATES]:
        workspace = Workspace(BatchPlan(plan, {}, batch, {layer.name: tile}, threads))
        workspace(x, *states)
        times[tile] = milliseconds(partial(workspace, x, *states), min_total=3.0)
    fastest = min(times, key=times.__getitem__)
    dense = milliseconds(partial(layer, x, *states), min_total=3.0, give_up=3 * times[fastest])
    sparse = times[fastest]
    return LayerTuning(sparse < dense, fastest, layer.sparsity, dense, sparse, packs=False)


def _plan_of_layer(layer: Layer | Recurrent, values: Sequence[Any], batch: Any) -> Plan:
    """Return the plan of a network that consists of one layer.

    Args:
        layer: the layer.
        values: tensors like its inputs and its result.
        batch: size or symbol of the batch, which may be another dimension of its input.
    """
    graph = Graph()
    inputs = []
    for i, value in enumerate(values[:-1]):
        inputs.append(graph.placeholder(f"x{i}"))
        inputs[-1].meta["val"] = value
    only = graph.call_function(layer, tuple(inputs))
    only.meta["val"] = values[-1]
    graph.output(only)
    return Plan.build(graph, [layer], batch=batch)


def _phases(place: Sparse, images: int) -> list[Tensor]:
    """Return tensors like the input and the result of a layer whose images are phases."""
    sizes = ((images, p.channels, p.height, p.width) for p in (place.x, place.out))
    return [torch.empty(size, device="meta") for size in sizes]


def _size_of(value: Tensor, symbol: Any, batch: int) -> tuple[int, ...]:
    # Not int(), which would fix a symbol of torch.export for the whole graph.
    sizes = sizes_of(value.shape, symbol)
    assert sizes is not None
    return tuple(constant + slope * batch for constant, slope in sizes)


def _random_input(size: tuple[int, ...], known: dict[Any, Any]) -> Tensor:
    """Return a random tensor of a size, the same one for all layers."""
    if ("input", size) not in known:
        generator = torch.Generator().manual_seed(0)  # leave the global generator unchanged
        values = torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")
        known["input", size] = values
    found: Tensor = known["input", size]
    return found
