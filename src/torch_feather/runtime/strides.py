"""Strides of a model's outputs, and writes into its input, found without computing values."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_leaves

from .memory import zeros_like
from .unrolled import known_shapes

MAX_LAYOUTS = 256  # number of input layouts whose results are kept

Strides = tuple[int, ...]


class ShapeModel:
    """A model that computes shapes and strides only.

    PyTorch chooses the strides of a result by those of the inputs: a convolution of images in
    channels-last order returns images in this order. The model itself runs here, on tensors
    without values, so the choices are its own. No weights are kept.

    Args:
        model: the model.
        program: the same, exported, before its decomposition, which replaces writes and views by
            other functions.
        names: names of the inputs that are given by name.

    Example:
        >>> model = torch.nn.Conv2d(3, 8, 1)
        >>> program = torch.export.export(model, (torch.ones(2, 3, 4, 4),))
        >>> ShapeModel(model, program).output_strides(torch.ones(2, 3, 4, 4))
        ((128, 16, 4, 1),)
    """

    def __init__(
        self, model: nn.Module, program: ExportedProgram, names: Sequence[str] = ()
    ) -> None:
        self._names = names
        inputs = set(program.graph_signature.user_inputs)
        given = [node for node in program.graph.nodes if node.op == "placeholder"]
        self._graph = program.graph_module
        # Weights without values; None is the input.
        self._weights = [None if node.name in inputs else node.meta["val"] for node in given]
        first = next(n.meta["val"] for n in given if n.name in inputs)
        self._graph_mode, self._batch = first.fake_mode, first.shape[0]
        self._outputs = len(program.graph_signature.user_outputs)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        tensors = (*model.parameters(), *model.buffers())
        # PyTorch converts zeros to tensors without values when they are used, which is rare.
        without_values = {id(t): zeros_like(t) for t in tensors}
        self._model: nn.Module | None = None
        with suppress(Exception):  # not every model can be copied again
            self._model = copy.deepcopy(model, without_values)
        examples = tree_leaves(program.example_inputs)
        self._captured_contiguous = all(x.is_contiguous() for x in examples)
        self._known: dict[Any, tuple[Strides | None, ...]] = {}

    def output_strides(self, *inputs: Tensor) -> tuple[Strides | None, ...]:
        """Return the strides of the tensors that the model returns for inputs like these.

        Args:
            inputs: the inputs; their values do not matter.

        Returns:
            Strides of each output, in the order of the graph. None for other values. Empty if the
            model fails for this input.
        """
        key = tuple((x.shape, x.stride()) for x in inputs)
        if key not in self._known:
            if len(self._known) >= MAX_LAYOUTS:
                self._known.clear()
            self._known[key] = tuple(map(_strides_of, self._outputs_for(*inputs)))
        return self._known[key]

    def output_shapes(self, *inputs: Tensor) -> tuple[tuple[int, ...] | None, ...]:
        """Return the shapes of the outputs, as `output_strides` returns strides."""
        return tuple(
            tuple(map(int, value.shape)) if isinstance(value, Tensor) else None
            for value in self._outputs_for(*inputs)
        )

    def _outputs_for(self, *inputs: Tensor) -> list[Any]:
        """Return the outputs without values; none if the model fails for this input."""
        # For other layouts than the example's the graph is second: it lacks functions that did
        # nothing for the example, such as `contiguous`. But it can run torch.cond without values,
        # and has no side effects.
        runs = [self._run_model, self._run_graph]
        if isinstance(self._batch, int) and len(inputs[0]) != self._batch:
            del runs[1]  # the sizes in the graph are others
        elif self._captured_contiguous and all(x.is_contiguous() for x in inputs):
            runs.reverse()
        for run in runs:
            with suppress(Exception):  # the model fails where the compiled network may not
                found = tree_leaves(run(inputs))
                if len(found) == self._outputs:
                    return found
        return []

    def write_into_input(self, *inputs: Tensor) -> str | None:
        """Return the function, and the module, that write into one of the model's inputs.

        Args:
            inputs: the inputs; their values do not matter.

        Returns:
            Text such as ``"relu_ in layer1"``; None if the input is not changed.
        """
        interpreter = _Watching(self._graph)
        with suppress(Exception):
            self._run_graph(inputs, interpreter)
        return interpreter.writer

    def _run_model(self, inputs: Sequence[Tensor]) -> Any:
        mode = self._mode
        with torch.compiler.set_stance("force_eager"), _without_values(mode, inputs) as given:
            assert self._model is not None
            if self._names:
                return self._model(**dict(zip(self._names, given, strict=True)))
            return self._model(*given)

    def _run_graph(self, inputs: Sequence[Tensor], interpreter: Interpreter | None = None) -> Any:
        interpreter = interpreter or _Computing(self._graph)
        with _without_values(self._graph_mode, inputs) as given:
            if isinstance(interpreter, _Watching):
                interpreter.inputs = given
            remaining = iter(given)
            return interpreter.run(*(next(remaining) if w is None else w for w in self._weights))


@contextmanager
def _without_values(mode: FakeTensorMode, inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Compute without values; the tensors are like the inputs."""
    with torch.inference_mode(False), torch.no_grad(), known_shapes(), mode, _without_log():
        yield [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in inputs
        ]


@contextmanager
def _without_log() -> Iterator[None]:
    """Keep errors of functions on these tensors, which are raised too, out of the log."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class _Computing(Interpreter):
    """Computes a graph without values; a GRU at once, see `unrolled`."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not torch.ops.aten.gru.input:
            return super().call_function(target, args, kwargs)
        with enable_python_dispatcher():
            return super().call_function(target, args, kwargs)


class _Watching(_Computing):
    """Finds the first function that writes into an input or into a view of one."""

    inputs: Sequence[Tensor]
    writer: str | None = None

    def run_node(self, node: Node) -> Any:
        before = [x._version for x in self.inputs]
        result = super().run_node(node)
        if self.writer is None and [x._version for x in self.inputs] != before:
            modules = list(node.meta.get("nn_module_stack", {}).values())
            where = modules[-1][0] if modules else ""
            name = str(node.target).removeprefix("aten.").partition(".")[0]
            self.writer = f"{name} in {where}" if where else name
        return result


def _strides_of(value: Any) -> Strides | None:
    return tuple(map(int, value.stride())) if isinstance(value, Tensor) else None


def with_strides(value: Tensor, strides: Sequence[int]) -> Tensor:
    """Return a tensor of these strides; copy `value` if it has others.

    Args:
        value: any tensor.
        strides: its strides in the result. Elements may overlap if they are equal, as those of an
            expanded tensor.

    Example:
        >>> with_strides(torch.ones(2, 3, 4), (12, 1, 3)).stride()
        (12, 1, 3)
    """
    sizes, strides = value.shape, tuple(strides)
    differ = [a != b for a, b, n in zip(value.stride(), strides, sizes, strict=True) if n > 1]
    if not any(differ) or not value.numel():  # the stride of a dimension of size 1 has no effect
        if value.stride() == strides:
            return value
        return value.as_strided(sizes, strides, value.storage_offset())
    result = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    if not _overlap(sizes, strides):
        return result.copy_(value)
    positions = torch.zeros(sizes, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        shape = [1] * len(sizes)
        shape[dim] = size
        positions += (torch.arange(size) * stride).view(shape)
    result.as_strided((int(positions.max()) + 1,), (1,))[positions.flatten()] = value.flatten()
    return result


def _overlap(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether elements may share memory."""
    end = 0  # last element of the dimensions so far
    for stride, size in sorted((s, n) for s, n in zip(strides, sizes, strict=True) if n > 1):
        if stride <= end:
            return True
        end += stride * (size - 1)
    return False
