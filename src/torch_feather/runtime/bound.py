"""A plan for one batch size: tables and memory, and the steps as they run."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ..errors import FeatherError
from .kernels import BLOCK, COPY, OPERATION, RECORD, Tile, aligned, library, tiles, vector_widths
from .plan import Copy, Plan, Pointwise, Sparse, Torch
from .planes import Planes, round_up


class InputError(FeatherError, ValueError):
    """The input is not what the network was compiled for."""


class Bound:
    """What all calls with a batch of this size share; it keeps workspaces for those to come."""

    def __init__(
        self, plan: Plan, constants: Mapping[str, Any], batch: int, tile: Mapping[str, Tile],
        threads: int,
    ) -> None:  # fmt: skip
        self.plan, self.constants, self.batch, self.threads = plan, constants, batch, threads
        self.tile = tile
        self._tables: dict[tuple[Sparse, int], dict[str, np.ndarray]] = {}
        self.places, self.pixels = self._allocate()
        self._free: list[Workspace] = []
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the plan; calls from several threads have a workspace each."""
        with self._lock:
            workspace = self._free.pop() if self._free else None
        if workspace is None:
            workspace = Workspace(self)
        result = workspace(*inputs)  # one that fails may still be in use by its threads
        with self._lock:
            self._free.append(workspace)
        return result

    def tables(self, step: Sparse) -> dict[str, np.ndarray]:
        """What the record of a layer points to, for the tile that it has."""
        channels = self.shape_of(step).channels
        if (step, channels) not in self._tables:
            grouped, grid = step.taps.grouped(channels), step.out.grid.root()
            try:
                taps = grouped.table(grid, self.batch)
            except OverflowError:
                raise InputError(
                    f"{step.layer.name}: a batch of {self.batch} makes planes of more than 2^31 "
                    "numbers; split the batch"
                ) from None
            tables = {
                "taps": taps,
                "rows": grouped.rows,
                "channels": grouped.order,
                "bias": np.ascontiguousarray(step.layer.bias.numpy()),
                "blocks": grouped.blocks(self.threads),
            }
            mask = step.out.mask(self.batch)
            if mask is not None:
                tables["mask"] = mask
            # Of two threads that made them at once, both get those that stay.
            return self._tables.setdefault((step, channels), tables)
        return self._tables[step, channels]

    def _allocate(self) -> tuple[dict[Planes, int], int]:
        """Where each activation begins; what is not used at the same time may share a place."""
        places: dict[Planes, int] = {}
        live: list[Planes] = []
        total = 0
        for i, step in enumerate(self.plan.steps):
            live = [planes for planes in live if self.plan.last[planes] >= i]
            if isinstance(step, Torch):
                continue
            size, start = round_up(step.out.pixels(self.batch)), 0
            for taken in sorted(live, key=places.__getitem__):
                if places[taken] - start >= size:
                    break
                start = max(start, places[taken] + round_up(taken.pixels(self.batch)))
            places[step.out] = start
            live.append(step.out)
            total = max(total, start + size)
        return places, total

    def shape_of(self, step: Sparse) -> Tile:
        """The tile that a layer has: the one chosen, or what comes next to it and fits."""
        plane, channels = step.out.grid.root().plane(self.batch), step.layer.channels[1]
        wanted = Tile(*self.tile[step.layer.name])
        width = wanted.width
        if width not in vector_widths():  # chosen on another machine
            width = vector_widths()[0]
        alike = [t for t in tiles() if t.width == width and t.vectors * width <= plane]
        most = wanted.channels if step.layer.combine == "fma" else 1
        shared = max(t.channels for t in alike if t.channels <= most and not channels % t.channels)
        fitting = [t for t in alike if t.channels == shared]
        smaller = [t for t in fitting if t.vectors <= wanted.vectors]
        return max(smaller) if smaller else min(fitting)

    def kernel(self, step: Sparse) -> tuple[Tile, int]:
        """The tile of a layer, and the address of its kernel."""
        tile, masks = self.shape_of(step), "mask" in self.tables(step)
        key = (tile, step.layer.combine, step.residual is not None, masks)
        return tile, library().convolutions[key]


class Call(NamedTuple):
    """A part of a run: given the values of the nodes so far, it adds some, or writes planes.

    Attributes:
        steps: what it computes in machine code.
    """

    run: Callable[[list[Any]], None]
    steps: Sequence[Sparse | Copy] = ()


class Workspace:
    """Memory of one call at a time, and the steps that use it."""

    @torch.inference_mode(False)  # what is made there cannot be written to elsewhere
    def __init__(self, bound: Bound) -> None:
        self.bound = weakref.proxy(bound)  # no cycle: when the one goes, the other's memory goes
        self.memory = torch.from_numpy(aligned(bound.pixels))
        self.barrier = np.zeros(16, np.int64)
        self.views = {node: self._view(planes) for node, planes in bound.plan.planes.items()}
        self.kept: list[Any] = []  # what addresses in records point to
        self.workers = (
            ThreadPoolExecutor(bound.threads - 1, "torch-feather")
            if bound.threads > 1 and library().team is None
            else None
        )
        nodes = [n for n in bound.plan.graph.nodes]
        self.slots: list[Any] = []
        self.slot: dict[Node, int] = {}
        for node in nodes:
            if node.op == "output":
                continue
            self.slot[node] = len(self.slots)
            constant = bound.constants.get(node.name) if node.op == "get_attr" else None
            self.slots.append(self.views.get(node, constant))
        self.inputs = [self.slot[n] for n in nodes if n.op == "placeholder"]
        self.output = next(n for n in nodes if n.op == "output").args[0]
        self.calls = list(self._calls())

    def __call__(self, *inputs: Tensor) -> Any:
        """The output; nothing of it lies in this workspace."""
        values = list(self.slots)
        for slot, x in zip(self.inputs, inputs, strict=True):
            values[slot] = x
        for call in self.calls:
            call.run(values)
        return map_arg(self.output, lambda node: self._own(values[self.slot[node]]))

    def _own(self, value: Any) -> Any:
        if isinstance(value, Tensor) and (
            value.untyped_storage().data_ptr() == self.memory.untyped_storage().data_ptr()
        ):
            return value.clone(memory_format=torch.contiguous_format)
        return value

    def _part(self, planes: Planes) -> Tensor:
        start = self.bound.places[planes]
        return self.memory[start : start + round_up(planes.pixels(self.bound.batch))]

    def _view(self, planes: Planes) -> Tensor:
        return planes.view(self._part(planes), self.bound.batch)

    def _calls(self) -> Iterator[Call]:
        steps = self.bound.plan.steps
        last: dict[Node, int] = {}
        for i, step in enumerate(steps):
            if isinstance(step, Torch):
                last |= dict.fromkeys(step.node.all_input_nodes, i)
            elif isinstance(step, Copy):
                last[step.source] = i
        machine = (Sparse, Copy)
        map_arg(self.output, lambda node: last.update({node: len(steps)}))
        for native, group in itertools.groupby(
            enumerate(steps), lambda item: isinstance(item[1], machine)
        ):
            if native:
                run = [step for _, step in group if isinstance(step, machine)]
                yield Call(self.native(run), run)
                for export in self._exports({step.out for step in run}):
                    yield Call(export)
                continue
            for i, step in group:
                if isinstance(step, Pointwise):
                    yield Call(self._pointwise(step))
                elif isinstance(step, Torch):
                    unused = [n for n in step.node.all_input_nodes if last[n] == i]
                    yield Call(self._torch(step.node, unused))

    def native(self, steps: Sequence[Sparse | Copy]) -> Callable[[list[Any]], None]:
        """One call into machine code that computes all of `steps`."""
        program = np.zeros(len(steps), OPERATION)
        sources = []
        for operation, step in zip(program, steps, strict=True):
            record = np.zeros((), RECORD if isinstance(step, Sparse) else COPY)
            self.kept.append(record)
            operation["record"] = record.ctypes.data
            if isinstance(step, Sparse):
                self._sparse(step, record, operation)
                continue
            read = self._copy(step, record, operation)
            if step.source in self.views:
                read(self.views[step.source])
            else:
                sources.append((self.slot[step.source], read))
        self.kept.append(program)
        run, team = library().run, library().team
        threads, workers = self.bound.threads, self.workers
        arrivals, barrier = self.barrier, self.barrier.ctypes.data
        at, n = program.ctypes.data, len(program)

        def call(values: list[Any]) -> None:
            kept = [read(values[slot]) for slot, read in sources]
            arrivals[0] = 0
            if threads == 1:
                run(at, n, 0, 1, barrier)
            elif team is not None:
                team(at, n, threads, barrier)
            else:
                assert workers is not None
                try:
                    others = [
                        workers.submit(run, at, n, thread, threads, barrier)
                        for thread in range(1, threads)
                    ]
                    run(at, n, 0, threads, barrier)
                    for other in others:
                        other.result()
                except BaseException:
                    arrivals[0] = 1 << 62  # nobody waits for a thread that does not come
                    workers.shutdown()  # all that came are waited for: the memory goes next
                    raise
            del kept

        return call

    def _sparse(self, step: Sparse, record: np.ndarray, operation: np.void) -> None:
        tile, operation["kernel"] = self.bound.kernel(step)
        tables, grid = self.bound.tables(step), step.out.grid.root()
        plane = grid.plane(self.bound.batch)
        for name, table in tables.items():
            record[name] = table.ctypes.data
        record["x"], record["out"] = self._first(step.x), self._first(step.out)
        if step.residual is not None:
            record["residual"] = self._first(step.residual)
        part, used = self._part(step.out), grid.edge + step.out.channels * plane
        record["lead"], record["lead_bytes"] = part.data_ptr(), 4 * grid.edge
        record["trail"], record["trail_bytes"] = part.data_ptr() + 4 * used, 4 * grid.edge
        pixels = tile.vectors * tile.width
        record["plane"], record["last"] = plane, plane - pixels
        record["n_blocks"] = len(tables["blocks"]) - 1
        record["low"], record["high"] = step.layer.low, step.layer.high
        operation["items"] = -(-plane // pixels) * (len(tables["blocks"]) - 1)

    def _first(self, planes: Planes) -> int:
        return self._part(planes).data_ptr() + 4 * planes.grid.root().edge

    def _copy(
        self, step: Copy, record: np.ndarray, operation: np.void
    ) -> Callable[[Tensor], Tensor]:
        """The function that is told the source; what it returns must live as long as the copy."""
        batch, grid, (height, width) = self.bound.batch, step.out.grid.root(), step.size
        (sy, sx), copies = step.stride, library().copies
        channels = step.out.channels // len(step.phases)
        phases = np.array(
            [(0, -(-(height - a) // sy), -(-(width - b) // sx)) for a, b in step.phases], np.int64
        )
        self.kept.append(phases)
        record["phases"], record["out"] = phases.ctypes.data, self._first(step.out)
        record["images"], record["channels"] = batch, channels
        record["all_channels"], record["fill"] = step.out.channels, step.outside
        record["plane"], record["image"] = grid.plane(batch), grid.image
        record["pitch"], record["rows"] = grid.pitch, grid.image // grid.pitch
        record["edge"] = grid.edge

        def read(x: Tensor) -> Tensor:
            if step.out.linear:
                x = x.reshape(batch, width, channels).permute(0, 2, 1).unsqueeze(2)
            x = x.resolve_neg()
            image, channel, row, column = x.stride()
            record["source"] = x.data_ptr()
            record["source_image"], record["source_channel"] = image, channel
            record["source_row"], record["source_column"] = row * sy, column * sx
            phases[:, 0] = [a * row + b * column for a, b in step.phases]
            known = column * sx if column * sx in copies else None
            operation["kernel"] = copies[known]
            blocks = channels if known else -(-channels // BLOCK)
            operation["items"] = len(step.phases) * blocks * batch
            return x

        return read

    def _exports(self, written: Set[Planes]) -> Iterator[Callable[[list[Any]], None]]:
        """Results of linear layers, channels together: what PyTorch does with tokens wants that."""
        for node, planes in self.bound.plan.planes.items():
            if planes in written and planes.linear and planes.shape[:-1] != ():
                if all(user in self.bound.plan.planes for user in node.users):
                    continue
                view, slot = self.views[node], self.slot[node]

                def call(values: list[Any], view: Tensor = view, slot: int = slot) -> None:
                    values[slot] = view.contiguous()

                yield call

    def _pointwise(self, step: Pointwise) -> Callable[[list[Any]], None]:
        """On all of the memory, zeros between images included: it is contiguous."""
        memory = {n: self._part(x) for n, x in zip(step.node.all_input_nodes, step.x, strict=True)}
        args, kwargs = map_arg((step.node.args, step.node.kwargs), memory.__getitem__)
        function = step.node.target.overloadpacket.out  # type: ignore[union-attr]
        out = self._part(step.out)

        def call(values: list[Any]) -> None:
            function(*args, **kwargs, out=out)

        return call

    def _torch(self, node: Node, unused: list[Node]) -> Callable[[list[Any]], None]:
        slot, slots = self.slot[node], self.slot
        args, kwargs, function = node.args, node.kwargs, node.target
        drop = [slots[n] for n in unused if n not in self.views and n.op == "call_function"]
        assert callable(function)
        if not kwargs and all(isinstance(a, Node) for a in args):
            places = [slots[a] for a in args if isinstance(a, Node)]

            def call(values: list[Any]) -> None:
                values[slot] = function(*[values[i] for i in places])
                for i in drop:
                    values[i] = None

            return call

        def call_mixed(values: list[Any]) -> None:
            given, named = map_arg((args, kwargs), lambda n: values[slots[n]])
            values[slot] = function(*given, **named)
            for i in drop:
                values[i] = None

        return call_mixed
