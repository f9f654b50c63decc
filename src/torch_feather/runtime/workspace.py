"""Memory of one call, and the functions that execute a plan in it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .batch import BatchPlan
from .kernels import CHANNEL_BLOCK, CONVOLUTION, COPY, OPERATION, library
from .memory import aligned_zeros, round_up
from .plan import Copy, Pointwise, Sparse, Torch
from .planes import Planes

Values = list[Any]  # values of the nodes of a graph


class Call(NamedTuple):
    """A part of an execution.

    Attributes:
        run: function of the values of the nodes so far; it sets further values or writes planes.
        steps: the steps that it executes in machine code.

    Example:
        >>> Call(lambda values: None).steps
        ()
    """

    run: Callable[[Values], None]
    steps: Sequence[Sparse | Copy] = ()


class WorkspacePool:
    """Executes a plan. Each concurrent call has its own workspace; workspaces are used again.

    Attributes:
        plan: the plan for one batch size.
        free: workspaces that no call uses.

    Example:
        >>> from torch.fx import Graph
        >>> from torch_feather.runtime.plan import Plan
        >>> graph = Graph()
        >>> _ = graph.output(graph.placeholder("x"))
        >>> WorkspacePool(BatchPlan(Plan.build(graph, []), {}, 1, {}, 1))(torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self.free: list[Workspace] = []
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the output of the graph. Several threads may call this concurrently."""
        with self._lock:
            workspace = self.free.pop() if self.free else None
        if workspace is None:
            workspace = Workspace(self.plan)
        result = workspace(*inputs)  # after an error its threads may still use the workspace
        with self._lock:
            self.free.append(workspace)
        return result


class Workspace:
    """Memory of one call, and the functions that execute the plan in it.

    Attributes:
        plan: the plan for one batch size.
        memory: all activations in planes.
        calls: functions that execute the plan, in order.
        index: position of each node's value in the list of values.
        values: values before the first step: constants and views of planes.
        inputs: positions of the inputs in the list of values.

    Example:
        >>> from torch.fx import Graph
        >>> from torch_feather.runtime.plan import Plan
        >>> graph = Graph()
        >>> _ = graph.output(graph.call_function(torch.neg, (graph.placeholder("x"),)))
        >>> Workspace(BatchPlan(Plan.build(graph, []), {}, 1, {}, 1))(torch.ones(2))
        tensor([-1., -1.])
    """

    @torch.inference_mode(False)  # inference tensors cannot be written to outside of that mode
    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self.memory = torch.from_numpy(aligned_zeros(plan.size))
        self.views = {node: self._view(planes) for node, planes in plan.plan.planes.items()}
        self._barrier = np.zeros(16, np.int64)  # a counter, padded to whole cache lines
        self._referenced: list[Any] = []  # arrays that records and programs point to
        self._workers = (
            ThreadPoolExecutor(plan.threads - 1, "torch-feather")
            if plan.threads > 1 and library().run_team is None
            else None
        )
        nodes = list(plan.plan.graph.nodes)
        self.values: Values = []
        self.index: dict[Node, int] = {}
        for node in nodes:
            if node.op == "output":
                continue
            self.index[node] = len(self.values)
            constant = plan.constants.get(node.name) if node.op == "get_attr" else None
            self.values.append(self.views.get(node, constant))
        self.inputs = [self.index[n] for n in nodes if n.op == "placeholder"]
        self._output = next(n for n in nodes if n.op == "output").args[0]
        self.calls = list(self._calls())

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the output of the graph. It shares no memory with this workspace."""
        values = list(self.values)
        for i, x in zip(self.inputs, inputs, strict=True):
            values[i] = x
        for call in self.calls:
            call.run(values)
        return map_arg(self._output, lambda node: self._copy_if_shared(values[self.index[node]]))

    def _copy_if_shared(self, value: Any) -> Any:
        if isinstance(value, Tensor) and (
            value.untyped_storage().data_ptr() == self.memory.untyped_storage().data_ptr()
        ):
            return value.clone(memory_format=torch.contiguous_format)
        return value

    def _memory_of(self, planes: Planes) -> Tensor:
        start = self.plan.offsets[planes]
        return self.memory[start : start + round_up(planes.size(self.plan.batch))]

    def _view(self, planes: Planes) -> Tensor:
        return planes.view(self._memory_of(planes), self.plan.batch)

    def _first_pixel(self, planes: Planes) -> int:
        return self._memory_of(planes).data_ptr() + 4 * planes.layout.root().edge

    def _calls(self) -> Iterator[Call]:
        steps = self.plan.plan.steps
        last_use = self._last_uses()
        machine_code = (Sparse, Copy)
        for native, group in itertools.groupby(
            enumerate(steps), lambda item: isinstance(item[1], machine_code)
        ):
            if native:
                run = [step for _, step in group if isinstance(step, machine_code)]
                yield Call(self.native(run), run)
                for make_contiguous in self._contiguous_results({step.out for step in run}):
                    yield Call(make_contiguous)
                continue
            for i, step in group:
                if isinstance(step, Pointwise):
                    yield Call(self._pointwise(step))
                elif isinstance(step, Torch):
                    unused = [n for n in step.node.all_input_nodes if last_use[n] == i]
                    yield Call(self._torch(step.node, unused))

    def _last_uses(self) -> dict[Node, int]:
        """Return the last step that reads each value that is not in planes."""
        steps = self.plan.plan.steps
        last_use: dict[Node, int] = {}
        for i, step in enumerate(steps):
            if isinstance(step, Torch):
                last_use |= dict.fromkeys(step.node.all_input_nodes, i)
            elif isinstance(step, Copy):
                last_use[step.source] = i
        map_arg(self._output, lambda node: last_use.update({node: len(steps)}))
        return last_use

    def native(self, steps: Sequence[Sparse | Copy]) -> Callable[[Values], None]:
        """Return a function that executes steps with one call into machine code."""
        program = np.zeros(len(steps), OPERATION)
        sources = []
        for operation, step in zip(program, steps, strict=True):
            record = np.zeros((), CONVOLUTION if isinstance(step, Sparse) else COPY)
            self._referenced.append(record)
            operation["record"] = record.ctypes.data
            if isinstance(step, Sparse):
                self._fill_convolution(step, record, operation)
                continue
            set_source = self._fill_copy(step, record, operation)
            if step.source in self.views:
                set_source(self.views[step.source])
            else:
                sources.append((self.index[step.source], set_source))
        self._referenced.append(program)
        run, run_team = library().run, library().run_team
        threads, workers = self.plan.threads, self._workers
        counter, barrier = self._barrier, self._barrier.ctypes.data
        address, n = program.ctypes.data, len(program)

        def call(values: Values) -> None:
            alive = [set_source(values[i]) for i, set_source in sources]
            counter[0] = 0
            if threads == 1:
                run(address, n, 0, 1, barrier)
            elif run_team is not None:
                run_team(address, n, threads, barrier)
            else:
                assert workers is not None
                try:
                    others = [
                        workers.submit(run, address, n, thread, threads, barrier)
                        for thread in range(1, threads)
                    ]
                    run(address, n, 0, threads, barrier)
                    for other in others:
                        other.result()
                except BaseException:
                    counter[0] = 1 << 62  # release threads that wait for one that never starts
                    workers.shutdown()  # the memory is freed next, so wait for all threads
                    raise
            del alive

        return call

    def _fill_convolution(self, step: Sparse, record: np.ndarray, operation: np.void) -> None:
        tile, operation["kernel"] = self.plan.kernel(step)
        tables, layout = self.plan.tables(step), step.out.layout.root()
        plane = layout.channel_stride(self.plan.batch)
        for name, table in tables.items():
            record[name] = table.ctypes.data
        record["x"], record["out"] = self._first_pixel(step.x), self._first_pixel(step.out)
        if step.residual is not None:
            record["residual"] = self._first_pixel(step.residual)
        start = self._memory_of(step.out).data_ptr()
        used = layout.edge + step.out.channels * plane
        record["lead"], record["lead_bytes"] = start, 4 * layout.edge
        record["trail"], record["trail_bytes"] = start + 4 * used, 4 * layout.edge
        pixels = tile.vectors * tile.width
        record["plane"], record["last"] = plane, plane - pixels
        record["n_blocks"] = len(tables["blocks"]) - 1
        record["low"], record["high"] = step.layer.low, step.layer.high
        operation["items"] = -(-plane // pixels) * (len(tables["blocks"]) - 1)

    def _fill_copy(
        self, step: Copy, record: np.ndarray, operation: np.void
    ) -> Callable[[Tensor], Tensor]:
        """Fill the record of a copy except for its source.

        Returns:
            A function that sets the source. The tensor that it returns must stay alive until the
            copy is done.
        """
        batch, layout, (height, width) = self.plan.batch, step.out.layout.root(), step.size
        (sy, sx), copies = step.stride, library().copies
        channels = step.out.channels // len(step.phases)
        phases = np.array(
            [(0, -(-(height - a) // sy), -(-(width - b) // sx)) for a, b in step.phases], np.int64
        )
        self._referenced.append(phases)
        record["phases"], record["out"] = phases.ctypes.data, self._first_pixel(step.out)
        record["images"], record["channels"] = batch, channels
        record["all_channels"], record["fill"] = step.out.channels, step.padding_value
        record["plane"], record["image"] = layout.channel_stride(batch), layout.image_stride
        record["pitch"] = layout.row_stride
        record["rows"] = layout.image_stride // layout.row_stride
        record["edge"] = layout.edge

        def set_source(x: Tensor) -> Tensor:
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
            blocks = channels if known else -(-channels // CHANNEL_BLOCK)
            operation["items"] = len(step.phases) * blocks * batch
            return x

        return set_source

    def _contiguous_results(self, written: Set[Planes]) -> Iterator[Callable[[Values], None]]:
        """Yield functions that copy results of linear layers into PyTorch's layout.

        PyTorch's functions of tokens are faster if the channels of a token are adjacent.
        """
        for node, planes in self.plan.plan.planes.items():
            if planes in written and planes.linear and planes.shape[:-1] != ():
                if all(user in self.plan.plan.planes for user in node.users):
                    continue
                view, i = self.views[node], self.index[node]

                def call(values: Values, view: Tensor = view, i: int = i) -> None:
                    values[i] = view.contiguous()

                yield call

    def _pointwise(self, step: Pointwise) -> Callable[[Values], None]:
        """Return a function that computes all pixels, including the padding.

        The memory of planes is contiguous only with its padding.
        """
        inputs = zip(step.node.all_input_nodes, step.x, strict=True)
        memory = {n: self._memory_of(x) for n, x in inputs}
        args, kwargs = map_arg((step.node.args, step.node.kwargs), memory.__getitem__)
        function = step.node.target.overloadpacket.out  # type: ignore[union-attr]
        out = self._memory_of(step.out)

        def call(values: Values) -> None:
            function(*args, **kwargs, out=out)

        return call

    def _torch(self, node: Node, unused: list[Node]) -> Callable[[Values], None]:
        """Return a function that calls PyTorch, then drops the values that are used no more."""
        result, index = self.index[node], self.index
        args, kwargs, function = node.args, node.kwargs, node.target
        drop = [index[n] for n in unused if n not in self.views and n.op == "call_function"]
        assert callable(function)
        if not kwargs and all(isinstance(a, Node) for a in args):
            given = [index[a] for a in args if isinstance(a, Node)]

            def call(values: Values) -> None:
                values[result] = function(*[values[i] for i in given])
                for i in drop:
                    values[i] = None

            return call

        def call_mixed(values: Values) -> None:
            positional, named = map_arg((args, kwargs), lambda n: values[index[n]])
            values[result] = function(*positional, **named)
            for i in drop:
                values[i] = None

        return call_mixed
