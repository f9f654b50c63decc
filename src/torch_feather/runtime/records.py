"""Records of the operations of a plan: the arguments of kernels, for the memory of one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch import BatchPlan
from .kernels import (
    ATTENTION,
    CHANNEL_BLOCK,
    COLUMN_STRIDES,
    CONVOLUTION,
    COPY,
    PLANE_OPERATION,
    RECURRENCE,
    TRANSPOSE,
    VECTORS,
    library,
    scratch_size,
)
from .memory import aligned_zeros, round_up
from .operation_records import OperationRecord
from .planes import Planes
from .recurrent_records import RecurrentRecords
from .steps import Attention, Copy, Operation, Recurrence, Sparse

SetSource = Callable[[Tensor], Any]


class Records:
    """Fills the records of operations.

    Args:
        plan: the plan for one batch size.
        memory: memory of all activations in planes.

    Attributes:
        referenced: arrays that records point to.

    Example:
        >>> from torch.fx import Graph
        >>> from torch_feather.runtime.plan import Plan
        >>> Records(BatchPlan(Plan(Graph()), {}, 1, {}, 1), torch.zeros(0)).referenced
        []
    """

    def __init__(self, plan: BatchPlan, memory: Tensor) -> None:
        self.plan, self.memory = plan, memory
        self.referenced: list[Any] = []
        self._scratch: dict[int, np.ndarray] = {}  # by size, which operations share

    def memory_of(self, planes: Planes) -> Tensor:
        """Return the memory of the planes that contain some planes."""
        start = self.plan.offsets[planes.root]
        return self.memory[start : start + round_up(planes.root.size(self.plan.batch))]

    def span(self, planes: Planes) -> Tensor:
        """Return the memory of planes, with what windows may read before them."""
        layout, root = planes.layout.root(), self.memory_of(planes)
        plane = planes.channel_stride(self.plan.batch)
        first = layout.edge + planes.start * plane
        return root[first - layout.lead : first + planes.channels * plane]

    def view(self, planes: Planes) -> Tensor:
        """Return planes as a tensor of the shape that PyTorch has."""
        return planes.view(self.memory_of(planes), self.plan.batch)

    def record(self, kind: np.dtype) -> np.ndarray:
        """Return a new record, which stays alive."""
        record = np.zeros((), kind)
        self.referenced.append(record)
        return record

    def convolution(self, step: Sparse, operation: np.void) -> None:
        """Fill the record of a sparse layer."""
        record = self.record(CONVOLUTION)
        tile, operation["kernel"] = self.plan.kernel(step)
        tables, layout = self.plan.tables(step), step.out.layout.root()
        plane = step.out.channel_stride(self.plan.batch)
        for name, table in tables.items():
            record[name] = table.ctypes.data
        record["x"], record["out"] = self._first_pixel(step.x), self._first_pixel(step.out)
        if step.residual is not None:
            record["residual"] = self._first_pixel(step.residual)
        record["lead"] = record["out"] - 4 * layout.lead
        record["lead_bytes"] = 4 * layout.lead
        record["trail"] = record["out"]  # what is behind is read for pixels of padding only
        pixels = tile.vectors * tile.width
        used = step.out.pixels(self.plan.batch)
        record["plane"], record["last"] = plane, used - pixels
        record["tail"] = (plane - used) // tile.width
        blocks, tiles = len(tables["blocks"]) - 1, -(-used // pixels)
        record["by_block"] = step.layer.channelwise
        record["inner"] = tiles if step.layer.channelwise else blocks
        record["low"], record["high"] = step.layer.low, step.layer.high
        if step.layer.activation is not None:
            record["activation"] = library().activation(step.layer.activation, tile.width)
        operation["items"] = tiles * blocks
        operation["record"] = record.ctypes.data

    def operation(self, step: Operation, operation: np.void) -> None:
        """Fill the record of another operation from planes to planes."""
        record = self.record(PLANE_OPERATION)
        given = record, step, self.plan.batch
        filled = OperationRecord(*given, self._first_pixel, self._address)
        operation["kernel"], operation["items"] = library().function(filled.kernel), filled.items
        operation["record"] = record.ctypes.data

    def recurrence(self, step: Recurrence, operation: np.void) -> RecurrentRecords:
        """Fill the records of a recurrent layer, except for its states.

        Returns:
            The part that is set at each call.
        """
        plan, batch, lanes = self.plan, self.plan.batch, self.plan.lanes
        records = np.zeros(len(step.directions), RECURRENCE)
        self.referenced.append(records)
        sample, time = (step.steps, 1) if step.batch_first else (1, batch)
        tables = plan.recurrent_tables(step)
        for i, (direction, record) in enumerate(zip(step.directions, records, strict=True)):
            backward = i == 1
            last = time * (step.steps - 1) if backward else 0
            section = round_up(direction.units * lanes)
            for name, table in tables[i].items():
                record[name] = table.ctypes.data
            out_plane = step.out.channel_stride(batch)
            record["g"] = self._first_pixel(step.x[i]) + 4 * last
            first_plane = i * direction.units * out_plane
            record["out"] = self._first_pixel(step.out) + 4 * (last + first_plane)
            record["g_plane"], record["out_plane"] = step.x[i].channel_stride(batch), out_plane
            record["sample"], record["time"] = sample, -time if backward else time
            record["rows"], record["g_rows"] = 4 * direction.units, direction.product.channels[1]
            memory = aligned_zeros(7 * section + round_up(lanes))
            record["gates"], record["section"] = self._address(memory), section
            record["c"] = record["gates"] + 4 * 4 * section
            record["h"] = record["gates"] + 4 * 5 * section
            for name in ("sigmoid", "tanh"):
                record[name] = library().activation(name, library().target.widths[0])
            record["steps"], record["samples"], record["lanes"] = step.steps, batch, lanes
            record["units"] = direction.units
        operation["kernel"] = library().recurrence(plan.recurrence(step))
        operation["items"] = len(records)
        operation["record"] = records.ctypes.data
        return RecurrentRecords(step, records)

    def attention(
        self, step: Attention, operation: np.void
    ) -> Callable[[Tensor, dict[Any, Tensor]], None]:
        """Fill the record of attention except for its mask.

        Returns:
            A function that sets the mask. It stores the mask in the order of the kernel in the
            dictionary, which must stay alive until the operation is done.
        """
        record, batch, width = self.record(ATTENTION), self.plan.batch, library().target.widths[0]
        for name, planes in zip(("q", "k", "v", "out"), (*step.x, step.out), strict=True):
            record[name] = self._first_pixel(planes)
            record[f"{name}_plane"] = planes.channel_stride(batch)
        record["depth"] = step.x[0].channels // step.heads
        record["v_depth"] = step.out.channels // step.heads
        size = scratch_size(width, int(record["depth"]), int(record["v_depth"]))
        if size not in self._scratch:
            self._scratch[size] = aligned_zeros(size * self.plan.threads)
        record["scratch"], record["scratch_size"] = self._scratch[size].ctypes.data, size
        sequences = batch * step.out.width // step.queries
        record["blocks"] = -(-step.queries // (VECTORS * width))
        operation["items"] = record["blocks"] * step.heads * sequences
        record["items"], record["threads"] = operation["items"], self.plan.threads
        record["heads"], record["scale"] = step.heads, step.scale
        record["queries"], record["keys"] = step.queries, step.keys
        record["causal"], record["masks"] = step.is_causal, 1
        operation["kernel"] = library().function("attention")
        operation["record"] = record.ctypes.data

        def set_mask(mask: Tensor, prepared: dict[Any, Tensor]) -> None:
            key = id(mask), step.queries, step.keys, step.dims, step.heads
            if key not in prepared:
                by_head = heads_second(mask, step.dims, step.heads)
                prepared[key] = keys_first(by_head, step.queries, step.keys)
            by_key = prepared[key]
            count, heads = by_key.shape[:2]
            record["mask"], record["mask_key"] = by_key.data_ptr(), by_key.stride(2)
            record["masks"], record["mask_sequence"] = count, by_key.stride(0)
            record["mask_head"] = by_key.stride(1) if heads > 1 else 0

        return set_mask

    def copy(self, step: Copy, operation: np.void) -> SetSource:
        """Fill the record of a copy except for its source.

        Returns:
            A function that sets the source. What it returns must stay alive until the copy is done.
        """
        record, transpose = self.record(COPY), self.record(TRANSPOSE)
        batch, layout, (height, width) = self.plan.batch, step.out.layout.root(), step.size
        sy, sx = step.stride
        channels = step.out.channels * step.out.phases // len(step.phases)
        phases = self._phases(step)
        record["phases"], record["out"] = phases.ctypes.data, self._first_pixel(step.out)
        record["n_phases"] = len(step.phases)
        record["images"], record["channels"] = batch, channels
        record["all_channels"], record["fill"] = step.out.channels, step.padding_value
        record["plane"], record["image"] = step.out.channel_stride(batch), layout.image_stride
        record["pitch"] = layout.row_stride
        record["rows"] = layout.image_stride // layout.row_stride
        record["edge"] = layout.lead
        transpose["out"], transpose["out_pitch"] = record["out"], record["plane"]
        transpose["columns"], vector = channels, library().target.widths[0]
        is_whole = step.stride == (1, 1) and layout.image_stride == height * width

        def set_source(x: Tensor) -> Any:
            if step.out.linear:
                x = x.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
            elif x.dim() == 5:  # slices of volumes are channels
                x = x.flatten(1, 2)
            x = x.resolve_neg()
            image, channel, row, column = x.stride()
            if (
                is_whole
                and (channel, row) == (1, column * width)
                and (batch == 1 or image == column * width * height)
                and min(channels, batch * height * width) >= vector
            ):
                transpose["source"], transpose["pitch"] = x.data_ptr(), column
                transpose["rows"] = batch * height * width
                operation["record"] = transpose.ctypes.data
                operation["kernel"] = library().function("transpose")
                operation["items"] = -(-batch * height * width // vector)
                return x
            record["source"] = x.data_ptr()
            record["source_image"], record["source_channel"] = image, channel
            record["source_row"], record["source_column"] = row * sy, column * sx
            phases[:, 0] = [a * row + b * column for a, b in step.phases]
            known = column * sx if column * sx in COLUMN_STRIDES else None
            operation["record"] = record.ctypes.data
            operation["kernel"] = library().function(f"copy_{known}")
            blocks = channels if known else -(-channels // CHANNEL_BLOCK)
            operation["items"] = len(step.phases) * blocks * batch
            if is_whole and (column, row) == (1, width):  # the planes are one row
                phases[:, 1:3] = 1, height * width
                record["rows"], record["pitch"] = 1, height * width
            elif is_whole:
                phases[:, 1:3] = height, width
                record["rows"], record["pitch"] = height, width
            return x

        return set_source

    def _phases(self, step: Copy) -> np.ndarray:
        """Return the table of the phases of a copy; see `COPY`. Sources are set later."""
        (height, width), (sy, sx), out, batch = step.size, step.stride, step.out, self.plan.batch
        plane, images = out.channel_stride(batch), batch * out.layout.root().image_stride
        count = len(step.phases)
        table = np.zeros((count, 5), np.int64)
        self.referenced.append(table)
        table[:, 1] = [-(-(height - a) // sy) for a, _ in step.phases]
        table[:, 2] = [-(-(width - b) // sx) for _, b in step.phases]
        if out.phases == 1:  # phases are channels
            table[:, 3] = np.arange(count) * (out.channels // count) * plane
            table[:, 4] = table[:, 3] + plane
        else:  # phases are images
            table[:, 3] = np.arange(count) * images
            table[:, 4] = table[:, 3] + images
            table[-1, 4] = plane
        return table

    def to_tokens(self, planes: Planes, operation: np.void) -> Callable[[], Tensor] | None:
        """Fill the record of a transposition of planes into PyTorch's order.

        Returns:
            A function that sets its result, a new tensor; None if the planes have padding or are
            too small.
        """
        batch, layout = self.plan.batch, planes.layout.root()
        shape, vector = self.view(planes).shape, library().target.widths[0]
        tokens = batch * planes.height * planes.width
        is_whole = layout.image_stride == planes.height * planes.width
        if not is_whole or min(tokens, planes.channels) < vector:
            return None
        record = self.record(TRANSPOSE)
        record["source"], record["rows"] = self._first_pixel(planes), planes.channels
        record["columns"], record["pitch"] = tokens, planes.channel_stride(batch)
        record["out_pitch"] = planes.channels
        operation["record"] = record.ctypes.data
        operation["kernel"] = library().function("transpose")
        operation["items"] = -(-planes.channels // vector)

        def set_result() -> Tensor:
            result = torch.empty(shape, dtype=torch.float32)
            record["out"] = result.data_ptr()
            return result

        return set_result

    def _first_pixel(self, planes: Planes) -> int:
        first = planes.layout.root().edge + planes.start * planes.channel_stride(self.plan.batch)
        return self.memory_of(planes).data_ptr() + 4 * first

    def _address(self, array: np.ndarray) -> int:
        self.referenced.append(array)
        return array.ctypes.data


def heads_second(mask: Tensor, dims: int, heads: int) -> Tensor:
    """Return a mask of attention with the dimensions sequence, head, query and key.

    Args:
        mask: can be broadcast to the scores.
        dims: dimensions of the scores before queries and keys: sequences and heads in one, or
            several of sequences and one of heads.
        heads: number of heads.

    Example:
        >>> heads_second(torch.ones(6, 1, 1), dims=1, heads=3).shape
        torch.Size([2, 3, 1, 1])
    """
    mask = mask.reshape((1,) * (dims + 2 - mask.dim()) + tuple(mask.shape))
    if dims > 1:
        return mask.flatten(0, dims - 2)
    return mask.unflatten(0, (-1, heads) if len(mask) > 1 else (1, 1))


def keys_first(mask: Tensor, queries: int, keys: int) -> Tensor:
    """Return a mask of attention as numbers that are added, with queries as the last dimension.

    Args:
        mask: bool or float32, (1 or sequences, 1 or heads, 1 or queries, 1 or keys).
        queries: number of queries.
        keys: number of keys.

    Returns:
        (1 or sequences, 1 or heads, keys, at least queries): the last dimension is filled up to
        whole cache lines.

    Example:
        >>> keys_first(torch.tensor([[[[True, False]]]]), queries=1, keys=2)[0, 0, :, 0]
        tensor([0., -inf])
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    count, heads = mask.shape[:2]
    result = torch.empty(count, heads, keys, round_up(queries))
    result[..., :queries] = mask.transpose(2, 3)
    return result
