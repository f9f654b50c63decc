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
from .functions import BINARY
from .kernels import OPERATION, library
from .memory import aligned_zeros
from .planes import Planes
from .reading import read_by
from .records import Records
from .recurrent_records import RecurrentRecords
from .steps import Attention, Copy, Operation, Pointwise, Recurrence, Sparse, Step, Torch

Values = list[Any]  # values of the nodes of a graph
Native = Sparse | Copy | Operation | Attention | Recurrence  # steps in machine code


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
    steps: Sequence[Native] = ()


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
        self.records = Records(plan, self.memory)
        self.views = {node: self.records.view(p) for node, p in plan.plan.planes.items()}
        self._masks: dict[Any, Tensor] = {}  # constant masks in the order of the kernel
        self._barrier = np.zeros(16, np.int64)  # a counter, padded to whole cache lines
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
            self.values.append(self.views.get(node, plan.constants.get(node.name)))
        self.inputs = [self.index[n] for n in nodes if n.op == "placeholder"]
        self._output = next(n for n in nodes if n.op == "output").args[0]
        shared = [self.memory, *(v for v in plan.constants.values() if isinstance(v, Tensor))]
        self._shared = {value.untyped_storage().data_ptr() for value in shared}
        self.calls = list(self._calls())

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the output of the graph. It shares no memory with this workspace or constants."""
        values = list(self.values)
        for i, x in zip(self.inputs, inputs, strict=True):
            values[i] = x
        for call in self.calls:
            call.run(values)
        return map_arg(self._output, lambda node: self._copy_if_shared(values[self.index[node]]))

    def _copy_if_shared(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._shared:
            return value.clone(memory_format=torch.contiguous_format)
        return value

    def _calls(self) -> Iterator[Call]:
        steps = [_in_machine_code(step) for step in self.plan.plan.steps]
        last_use = self._last_uses()
        machine_code = (Sparse, Copy, Operation, Attention, Recurrence)
        for native, group in itertools.groupby(
            enumerate(steps), lambda item: isinstance(item[1], machine_code)
        ):
            if native:
                run = [step for _, step in group if isinstance(step, machine_code)]
                yield from (Call(self.native(part), part) for part in self._separated(run))
                continue
            for i, step in group:
                if isinstance(step, Pointwise):
                    yield Call(self._pointwise(step))
                elif isinstance(step, Torch):
                    unused = [n for n in step.node.all_input_nodes if last_use[n] == i]
                    yield Call(self._torch(step.node, unused))

    def _separated(self, steps: Sequence[Native]) -> Iterator[list[Native]]:
        """Yield parts of successive steps; what a part reads as tensors is complete before it.

        Masks of attention and initial states may be in planes, which an earlier step writes.
        """
        part: list[Native] = []
        for step in steps:
            if part and not isinstance(step, Copy) and any(n in self.views for n in read_by(step)):
                yield part
                part = []
            part.append(step)
        yield part

    def _last_uses(self) -> dict[Node, int]:
        """Return the last step that reads each value that is not in planes."""
        steps = self.plan.plan.steps
        last_use: dict[Node, int] = {}
        for i, step in enumerate(steps):
            last_use |= dict.fromkeys(read_by(step), i)
        map_arg(self._output, lambda node: last_use.update({node: len(steps)}))
        return last_use

    def native(self, steps: Sequence[Native]) -> Callable[[Values], None]:
        """Return a function that executes steps with one call into machine code."""
        results = list(self._token_results({step.out for step in steps}))
        program = np.zeros(len(steps) + len(results), OPERATION)
        sources: list[tuple[int, Callable[[Any], Any]]] = []
        recurrent: list[tuple[list[int], int, RecurrentRecords]] = []
        masks: list[tuple[int, Callable[[Any, dict[Any, Tensor]], None]]] = []
        constants = self.plan.constants
        for operation, step in zip(program, steps, strict=False):
            if isinstance(step, Sparse):
                self.records.convolution(step, operation)
            elif isinstance(step, Operation):
                self.records.operation(step, operation)
            elif isinstance(step, Recurrence):
                states = [self.index[n] for n in step.states]
                records = self.records.recurrence(step, operation)
                recurrent.append((states, self.index[step.node], records))
            elif isinstance(step, Attention):
                set_mask = self.records.attention(step, operation)
                if step.mask is not None and step.mask.name in constants:
                    set_mask(constants[step.mask.name], self._masks)
                elif step.mask is not None:
                    masks.append((self.index[step.mask], set_mask))
            else:
                set_source = self.records.copy(step, operation)
                if step.source in self.views:
                    set_source(self.views[step.source])
                else:
                    sources.append((self.index[step.source], set_source))
        tokens, others, used = [], [], len(steps)
        for node, planes in results:
            if set_result := self.records.to_tokens(planes, program[used]):
                tokens.append((self.index[node], set_result))
                used += 1
            else:
                others.append((self.index[node], self.views[node]))
        execute = self._executor(program[:used])

        def call(values: Values) -> None:
            alive: list[Any] = [set_source(values[i]) for i, set_source in sources]
            prepared: dict[Any, Tensor] = {}
            for i, set_mask in masks:
                set_mask(values[i], prepared)
            for i, set_result in tokens:
                values[i] = set_result()
            for states, i, records in recurrent:
                initial = [values[k].resolve_neg() for k in states]
                alive.append(initial)
                records.set_initial(initial)
                values[i] = records.final(initial, values[i] if records.step.number else None)
            execute()
            for i, view in others:
                values[i] = view.contiguous()
            del alive, prepared

        return call

    def _executor(self, program: np.ndarray) -> Callable[[], None]:
        """Return a function that executes operations on all threads."""
        self.records.referenced.append(program)
        run, run_team = library().run, library().run_team
        threads, workers = self.plan.threads, self._workers
        counter, barrier = self._barrier, self._barrier.ctypes.data
        address, n = program.ctypes.data, len(program)

        def execute() -> None:
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

        return execute

    def _token_results(self, written: Set[Planes]) -> Iterator[tuple[Node, Planes]]:
        """Yield results of linear layers that functions of PyTorch read.

        They are copied into PyTorch's order: its functions of tokens are faster if the channels of
        a token are adjacent.
        """
        read = self.plan.plan.read_in_pytorch
        for node, planes in self.plan.plan.planes.items():
            is_result = planes.linear and planes.shape[:-1] != () and planes.is_within(written)
            if is_result and node in read:
                yield node, planes

    def _pointwise(self, step: Pointwise) -> Callable[[Values], None]:
        """Return a function that computes all pixels, including the padding.

        The memory of planes is contiguous only with its padding.
        """
        inputs = zip(step.node.all_input_nodes, step.x, strict=True)
        memory = {n: self.records.span(x) for n, x in inputs}
        args, kwargs = map_arg((step.node.args, step.node.kwargs), memory.__getitem__)
        function = step.node.target.overloadpacket.out  # type: ignore[union-attr]
        out = self.records.span(step.out)

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


def _in_machine_code(step: Step) -> Step:
    """Return the machine-code operation equivalent to a step, or the step itself."""
    if not isinstance(step, Pointwise) or step.node.kwargs or step.node.target not in BINARY:
        return step
    planes = dict(zip(step.node.all_input_nodes, step.x, strict=True))
    a, b = (planes[x] for x in step.node.args if isinstance(x, Node))
    return Operation(BINARY[step.node.target], (a, b), step.out)
