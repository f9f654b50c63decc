"""A plan for one batch size: the tables of its layers, and where activations are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import InputError
from .kernels import Tile, Variant, library
from .memory import round_up
from .plan import Plan
from .planes import Planes
from .steps import Recurrence, Sparse, Step, Torch


class BatchPlan:
    """A plan for one batch size, shared by all calls with a batch of this size.

    Attributes:
        plan: the steps.
        constants: values of the nodes that do not depend on the input, by name.
        batch: number of samples.
        tiles: requested tile of each layer, by the name of its weight.
        threads: number of threads of sparse layers.
        offsets: first float32 value in a workspace of planes that have memory of their own.
        size: number of float32 values in a workspace.

    Example:
        >>> from torch.fx import Graph
        >>> BatchPlan(Plan(Graph()), {}, batch=2, tiles={}, threads=1).size  # no activations
        0
    """

    def __init__(
        self,
        plan: Plan,
        constants: Mapping[str, Any],
        batch: int,
        tiles: Mapping[str, Tile],
        threads: int,
    ) -> None:
        self.plan, self.constants, self.batch, self.threads = plan, constants, batch, threads
        self.tiles = tiles
        self._tables: dict[tuple[Step, int], dict[str, np.ndarray]] = {}
        self.offsets, self.size = self._allocate()

    def is_like(self, other: BatchPlan) -> bool:
        """Return whether another plan of the same network executes the same steps."""
        sizes = (self.batch, self.threads), (other.batch, other.threads)
        return self.plan is other.plan and sizes[0] == sizes[1]

    def tables(self, step: Sparse) -> dict[str, np.ndarray]:
        """Return the arrays that the record of a layer points to, by the name of the field.

        Raises:
            InputError: the batch is too large for offsets of 32 bits.
        """
        channels = self.tile(step).channels
        if (step, channels) not in self._tables:
            grouped = step.taps.grouped(channels)
            try:
                taps = grouped.table(step.x, self.batch)
            except OverflowError:
                raise InputError(
                    f"{step.layer.name}: a batch of {self.batch} needs planes of more than 2^31 "
                    "values. Split the batch."
                ) from None
            tables = {
                "taps": taps,
                "rows": grouped.rows,
                "channels": grouped.order,
                "bias": np.ascontiguousarray(step.layer.bias.numpy()),
                "blocks": grouped.blocks(None if step.layer.channelwise else self.threads),
            }
            mask = step.out.mask(self.batch)
            if mask is not None:
                tables["mask"] = mask
            # If two threads create the tables at once, both use those that were stored first.
            return self._tables.setdefault((step, channels), tables)
        return self._tables[step, channels]

    def free_tables(self, step: Sparse) -> None:
        """Free the arrays of a layer, which no workspace may use any more."""
        self._tables = {key: tables for key, tables in self._tables.items() if key[0] is not step}

    def recurrent_tables(self, step: Recurrence) -> list[dict[str, np.ndarray]]:
        """Return the arrays that the records of a recurrent layer point to, for each direction."""
        lanes, found = self.lanes, []
        for i, direction in enumerate(step.directions):
            if (step, i) not in self._tables:
                self._tables.setdefault((step, i), direction.tables(lanes))
            found.append(self._tables[step, i])
        return found

    def recurrence(self, step: Recurrence) -> str:
        """Return the name of the kernel of a recurrent layer."""
        return step.cell if self.lanes > 1 else f"{step.cell}_one"

    @property
    def lanes(self) -> int:
        """Number of samples in the memory of recurrent layers: whole vectors, or one."""
        width = library().target.widths[0]
        return 1 if self.batch == 1 else -(-self.batch // width) * width

    def tile(self, step: Sparse) -> Tile:
        """Return the tile of a layer: the requested one, or the closest one that fits."""
        pixels, channels = step.out.pixels(self.batch), step.layer.channels[1]
        requested = Tile(*self.tiles[step.layer.name])
        widths, width = library().target.widths, requested.width
        if width not in widths:  # tuned on another machine
            width = widths[0]
        alike = [t for t in library().tiles if t.width == width and t.vectors * width <= pixels]
        most = requested.channels if step.layer.combine == "fma" else 1
        shared = max(t.channels for t in alike if t.channels <= most and not channels % t.channels)
        fitting = [t for t in alike if t.channels == shared]
        smaller = [t for t in fitting if t.vectors <= requested.vectors]
        return max(smaller) if smaller else min(fitting)

    def variant(self, step: Sparse, tile: Tile) -> Variant:
        """Return the kernel of a layer for a tile."""
        masks = "mask" in self.tables(step)
        return Variant(tile, step.layer.combine, step.residual is not None, masks)

    def kernel(self, step: Sparse) -> tuple[Tile, int]:
        """Return the tile of a layer and the address of its kernel."""
        tile = self.tile(step)
        return tile, library().convolution(self.variant(step, tile))

    def _allocate(self) -> tuple[dict[Planes, int], int]:
        """Assign memory to activations, so that those in use at the same time do not overlap."""
        offsets: dict[Planes, int] = {}
        live: list[Planes] = []
        total = 0
        for i, step in enumerate(self.plan.steps):
            live = [planes for planes in live if self.plan.last_use[planes] >= i]
            if isinstance(step, Torch) or step.out.root in offsets:
                continue
            out = step.out.root
            size, start = round_up(out.size(self.batch)), 0
            for taken in sorted(live, key=offsets.__getitem__):
                if offsets[taken] - start >= size:
                    break
                start = max(start, offsets[taken] + round_up(taken.size(self.batch)))
            offsets[out] = start
            live.append(out)
            total = max(total, start + size)
        return offsets, total
