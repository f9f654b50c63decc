"""Graphs for inputs of other sizes than the example's, captured when such an input comes.

torch.export takes about twice as long to capture a model for any batch size as for one, and many
networks only ever see the sizes of their example.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .capture import Captured, capture
from .constants import attributes, with_results
from .errors import CaptureError, InputError
from .independence import samples_of
from .inputs import Example, like, tensors_of
from .layer import Layer
from .memory import zeros_like
from .ownership import Ownership, called_layers
from .plan import Plan, can_run_sparse
from .recurrent import Recurrent
from .steps import Sparse
from .tuning import Tuning

MAX_GRAPHS = 8  # number of other sizes for which graphs are kept; one holds for many batch sizes


Sizes = tuple[tuple[int, ...], ...]  # of one sample of each input


class Planned(NamedTuple):
    """A captured graph and its plan.

    Attributes:
        captured: the graph.
        plan: its steps.
        constants: values of its nodes that do not depend on the input, by name.
        chunk_size: number of samples that the plan processes together; None for whole batches.

    Example:
        >>> captured = capture(nn.ReLU(), torch.ones(3, 4))
        >>> Planned(captured, Plan.build(captured.module.graph, []), {}).constants
        {}
    """

    captured: Captured
    plan: Plan
    constants: Mapping[str, Any]
    chunk_size: int | None = None


def capture_example(
    model: nn.Module, example: Example, ownership: Ownership | None = None
) -> tuple[Captured, OtherSizes | None]:
    """Capture a model for the batch size of an example.

    Args:
        model: in eval mode.
        example: its inputs.
        ownership: copies the constants of the graph that share the memory of another model.

    Returns:
        The graph, and what captures those for other sizes. None if the model cannot be captured
        again later; then the graph is for any batch size if the model allows it.

    Raises:
        CaptureError: torch.export cannot capture the model, or the model writes into its input.

    Example:
        >>> captured, others = capture_example(nn.Linear(4, 2), torch.ones(1, 4))
        >>> captured.accepts(torch.ones(3, 4)), others is None
        (False, False)
    """
    ownership = ownership or Ownership(nn.Module())
    try:
        # Branches of torch.cond are compiled: for one size first, PyTorch would then compile them
        # for several only.
        with torch.compiler.set_stance("force_eager"):
            captured = capture(model, example, any_batch=False)
        ownership.own_constants(captured.module)
        return captured, OtherSizes(model, example, captured)
    except Exception:  # of many types
        captured = capture(model, example)
        ownership.own_constants(captured.module)
        return captured, None


class OtherSizes:
    """Captures a model again, for other sizes. The weights of the first capture are used.

    It keeps a copy of the model whose layers have zeros as weights. They take no memory, since
    nothing writes to it.

    Args:
        model: in eval mode.
        example: its inputs.
        first: the graph for the example's sizes.

    Raises:
        Exception: the model cannot be copied in this way.

    Example:
        >>> model, x = nn.Conv1d(4, 2, 1), torch.ones(1, 4, 9)
        >>> others = OtherSizes(model, x, capture(model, x, any_batch=False))
        >>> found = others.find({}, None, [torch.ones(3, 4, 5)])
        >>> found.captured.accepts(torch.ones(2, 4, 5))
        True
    """

    def __init__(self, model: nn.Module, example: Example, first: Captured) -> None:
        values = attributes(first.module)
        if any(isinstance(value, nn.Module) for value in values.values()):
            raise ValueError("branches of torch.cond may contain weights")
        self._layers = {
            n.target.name: n.target
            for n in first.module.graph.nodes
            if isinstance(n.target, Layer | Recurrent)
        }
        self._factors = {name: _count_factors(layer) for name, layer in self._layers.items()}
        self._values = {str(node.target): value for node, value in values.items()}
        self._names = {name for name, _ in _state(model)}
        copies, zeros = self._copies(model)
        self._zeros = {tensor.untyped_storage().data_ptr() for tensor in zeros}
        self._model = copy.deepcopy(model, copies)
        self._batch = len(tensors_of(example)[0])
        self._form = like(example, [torch.empty(0) for _ in tensors_of(example)])
        self._found: list[tuple[Sizes, Planned]] = []  # the last one was used last

    def _copies(self, model: nn.Module) -> tuple[dict[int, Tensor], list[Tensor]]:
        """Return what stands for the tensors of a model, by their `id`, and those that are zeros.

        A capture reads the values of buffers, such as masks of attention. No parameter is kept:
        those of functions stand for themselves in memory of the first graph.
        """
        weights = {name.partition("@")[0] for name in self._layers}
        copies, zeros = dict[int, Tensor](), dict[int, Tensor]()
        for name, tensor in _state(model):
            own = self._values.get(name)
            if name in weights:
                zeros[id(tensor)] = zeros_like(tensor)
            elif not isinstance(tensor, nn.Parameter):
                copies[id(tensor)] = tensor
            elif isinstance(own, Tensor):
                copies[id(tensor)] = nn.Parameter(own, requires_grad=tensor.requires_grad)
        for _, tensor in _state(model):
            if id(tensor) not in copies:
                zeros.setdefault(id(tensor), zeros_like(tensor))
        return copies | zeros, list(zeros.values())

    def find(self, tuning: Tuning, chunk_size: int | None, given: Sequence[Tensor]) -> Planned:
        """Return a graph for inputs of these sizes; it may hold for other batch sizes, too.

        The first call for a size takes seconds.

        Args:
            tuning: how each layer runs, by the name of its weight.
            chunk_size: number of samples to process together, if the graph keeps samples apart.
            given: inputs, in the order of the example. Their values do not matter.

        Raises:
            InputError: the model cannot be captured for these sizes.
        """
        sizes = _sizes(given)
        for i, (known, planned) in enumerate(self._found):
            if known == sizes and planned.captured.accepts(*given):
                self._found.append(self._found.pop(i))
                return planned
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            try:
                planned = self._capture(tuning, chunk_size, given)
            except CaptureError as error:
                raise InputError(
                    "The network cannot be compiled for inputs of the sizes "
                    f"{', '.join(str(tuple(x.shape)) for x in given)}: {error}"
                ) from error
        self._found = [*self._found[1 - MAX_GRAPHS :], (sizes, planned)]
        return planned

    def _capture(self, tuning: Tuning, chunk_size: int | None, given: Sequence[Tensor]) -> Planned:
        """Capture the model.

        Raises:
            CaptureError: torch.export cannot capture it, or it uses other weights than before.
        """
        captured = self._capture_batch(given, self._batch)
        if not captured.accepts(*given):
            captured = self._capture_batch(given, len(given[0]))
        graph = captured.module.graph
        batch = next(n for n in graph.nodes if n.op == "placeholder").meta["val"].shape[0]
        values = attributes(captured.module)
        if not captured.accepts(*given) or not self._set_weights(captured, values):
            raise CaptureError(
                f"{type(self._model).__name__} uses other weights for these sizes than for those "
                "of the example. Compile another network with an example of these sizes."
            )
        sparse = [
            n.target
            for n in graph.nodes
            if isinstance(n.target, Layer | Recurrent)
            and (chosen := tuning.get(n.target.name))
            and chosen.sparse
            and can_run_sparse(n, batch)
        ]
        values = with_results(graph, values)
        plan = Plan.build(graph, sparse, values)
        called = called_layers(plan)
        for layer in called:  # they may run sparse for the example's size
            layer.fold()
        for layer in {step.layer for step in plan.steps if isinstance(step, Sparse)} - called:
            if layer.kernel_form is layer and self._layers.get(layer.name) is not layer:
                layer.release()
        if chunk_size is not None and samples_of(graph, values, batch) is None:
            chunk_size = None
        named = {node.name: value for node, value in values.items()}
        return Planned(captured, plan, named, chunk_size)

    def _capture_batch(self, given: Sequence[Tensor], batch: int) -> Captured:
        """Capture the model for samples of these sizes, if possible for any number of them."""
        samples = [zeros_like(torch.empty((batch, *x.shape[1:]), dtype=x.dtype)) for x in given]
        return capture(self._model, like(self._form, samples))

    def _set_weights(self, captured: Captured, values: dict[Any, Any]) -> bool:
        """Give the layers and constants of a graph the values of the first one.

        Returns:
            Whether the first graph has all of them.
        """
        for node in captured.module.graph.nodes:
            if isinstance(node.target, Layer | Recurrent) and not node.target.pools:
                known = self._layers.get(node.target.name)
                if known is None or _described(known) != _described(node.target):
                    return False
                if self._factors[known.name] != _count_factors(node.target):
                    return False  # a batch norm is part of one of them only
                node.target = _with_weights_of(known, node.target)
        for node, value in values.items():
            name = str(node.target)
            if isinstance(value, nn.Module):
                return False
            has_zeros = (
                isinstance(value, Tensor)
                and value.numel() > 0
                and value.untyped_storage().data_ptr() in self._zeros
            )
            if (has_zeros or name in self._names) and name in self._values:
                values[node] = self._values[name]
            elif has_zeros:
                return False
        return True


def _state(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters and buffers under all of their names."""
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _sizes(given: Sequence[Tensor]) -> Sizes:
    return tuple(tuple(x.shape[1:]) for x in given)


def _described(layer: Layer | Recurrent) -> Any:
    """Return what is equal in two layers with the same weights."""
    if isinstance(layer, Recurrent):
        return type(layer), [w.shape for w in layer.weights], layer.options
    return type(layer), layer.weight.shape


def _count_factors(layer: Layer | Recurrent) -> int:
    return len(layer.factors) if isinstance(layer, Layer) else 0


def _with_weights_of(known: Any, layer: Any) -> Any:
    """Return a layer with the weights of another: this one, if only the weights differ."""
    if known.options == layer.options:
        return known
    # For example, "same" padding depends on the size of the image.
    return replace(layer, weight=known.folded_weight(), bias=known.bias, factors=())
