"""Sparse layers for a target: their tiles, the tables that kernels read, and their records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..runtime.kernels import CONVOLUTION, Target, Tile, Variant, tiles
from ..runtime.plan import Sparse
from ..runtime.tuning import LayerTuning
from .packing import PackedTaps, pack
from .program import Buffer, Convolution

Tuning = Mapping[str, LayerTuning]


@dataclass(eq=False)
class KernelCall:
    """A call of a convolution kernel.

    Attributes:
        variant: the kernel.
        record: values of the record's numbers; its addresses are 0.
        taps: its taps, from which the table is computed.
        tables: other arrays that the record points to, by field.
        memory: buffers and numbers of bytes in them that the record points to, by field.
        items: work items.

    Example:
        >>> from ..runtime.kernels import Tile
        >>> empty = np.zeros(0)
        >>> taps = PackedTaps(empty, np.zeros((0, 1)), empty, 16, empty)
        >>> variant = Variant(Tile(1, 4), "fma", False, False)
        >>> call = KernelCall(variant, np.zeros(()), taps, {}, {}, 1)
        >>> call.variant.name
        'fma_1x4x1'
    """

    variant: Variant
    record: np.ndarray
    taps: PackedTaps
    tables: dict[str, np.ndarray]
    memory: dict[str, tuple[Buffer, int]]
    items: int


def kernel_call(
    operation: Convolution, batch: int, target: Target, tuning: Tuning | None = None
) -> KernelCall:
    """Return the call of the kernel that computes a sparse layer.

    Args:
        operation: the layer.
        batch: number of samples.
        target: the processor.
        tuning: measured tiles by the name of the weight, see `compile_sparse`.

    Example:
        >>> import torch
        >>> from ..runtime.layer import Layer
        >>> from ..runtime.planes import PlaneLayout, Planes
        >>> from ..runtime.taps import Taps
        >>> layer = Layer("weight", torch.eye(4), torch.zeros(4))
        >>> x, out = (Planes(PlaneLayout(1, 1), 4, 1, 1, (4,), linear=True) for _ in range(2))
        >>> step = Sparse(layer, Taps.from_layer(layer), x, out)
        >>> memory = Buffer("work", 80), Buffer("work", 80)
        >>> kernel_call(Convolution(step, *memory), 1, Target("riscv64-linux-gnu")).items
        1
    """
    step = operation.step
    layer, layout = step.layer, step.out.layout.root()
    plane = layout.channel_stride(batch)
    known = (tuning or {}).get(layer.name)
    tile = choose_tile(step, plane, target, None if known is None else known.tile)
    grouped = step.taps.grouped(tile.channels)
    packed = pack(step, grouped, grouped.table(step.x, batch), plane)
    tables = {
        "rows": grouped.rows,
        "channels": grouped.order,
        "bias": np.ascontiguousarray(layer.bias.numpy()),
        "blocks": grouped.blocks(None if layer.channelwise else 1),
    }
    mask = step.out.mask(batch)
    if mask is not None:
        tables["mask"] = mask
    edge = 4 * layout.edge
    memory = {
        "x": (operation.x, edge),
        "out": (operation.out, edge),
        "lead": (operation.out, 0),
        "trail": (operation.out, edge + 4 * step.out.channels * plane),
    }
    if operation.residual is not None:
        memory["residual"] = operation.residual, edge
    pixels = tile.vectors * tile.width
    record = np.zeros((), CONVOLUTION)
    record["plane"], record["last"] = plane, plane - pixels
    blocks, n_tiles = len(tables["blocks"]) - 1, -(-plane // pixels)
    record["by_block"], record["inner"] = (
        layer.channelwise,
        n_tiles if layer.channelwise else blocks,
    )
    record["lead_bytes"] = record["trail_bytes"] = edge
    record["low"], record["high"] = layer.low, layer.high
    variant = Variant(tile, layer.combine, operation.residual is not None, mask is not None)
    return KernelCall(variant, record, packed, tables, memory, blocks * n_tiles)


def choose_tile(step: Sparse, plane: int, target: Target, measured: Tile | None = None) -> Tile:
    """Return the tile of a layer: the measured one if the target has it, or one by estimate.

    The estimate counts the instructions of all taps: one per load, per broadcast weight and per
    multiply-add, and one for the loop. Other processors cannot be timed on this machine.

    Args:
        step: the layer.
        plane: pixels between consecutive channels.
        target: the processor.
        measured: the fastest tile by measurement, maybe on another machine.

    Example:
        >>> import torch
        >>> from ..runtime.layer import Layer
        >>> from ..runtime.planes import PlaneLayout, Planes
        >>> from ..runtime.taps import Taps
        >>> layer = Layer("weight", torch.eye(4), torch.zeros(4))
        >>> x, out = (Planes(PlaneLayout(1, 1), 4, 1, 1, (4,), linear=True) for _ in range(2))
        >>> step = Sparse(layer, Taps.from_layer(layer), x, out)
        >>> choose_tile(step, 16, Target("riscv64-linux-gnu"))
        Tile(vectors=4, width=4, channels=1)
    """
    most = step.layer.channels[1] if step.layer.combine == "fma" else 1
    fitting = [
        tile
        for tile in tiles(target.widths)
        if tile.vectors * tile.width <= plane
        and tile.channels <= most
        and step.layer.channels[1] % tile.channels == 0
    ]
    if measured in fitting:
        return measured
    taps = {n: int(step.taps.grouped(n).rows[-1]) for n in {t.channels for t in fitting}}

    def cost(tile: Tile) -> tuple[int, int]:
        per_tap = tile.vectors * (1 + tile.channels) + tile.channels + 1
        count = -(-plane // (tile.vectors * tile.width))
        return count * per_tap * taps[tile.channels], -tile.vectors

    return min(fitting, key=cost)
