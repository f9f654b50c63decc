"""The graph for other batch sizes than the example's, captured when one of them comes.

torch.export takes about twice as long to capture a model for any batch size as for one, and many
networks only ever see the batch size of their example.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .capture import Captured, capture
from .constants import attributes, with_results
from .errors import CaptureError
from .independence import samples_of
from .inputs import Example, like, tensors_of
from .layer import Layer
from .memory import zeros_like
from .ownership import Ownership, called_layers
from .plan import Plan, can_run_sparse
from .recurrent import Recurrent
from .tuning import Tuning


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
        The graph, and what captures the one for other batch sizes. None if the graph is for any
        size already, because the model cannot be captured again later, or not at all.

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
    """Captures a model again, for any batch size. The weights of the first capture are used.

    It keeps a copy of the model whose layers have zeros as weights. They take no memory, since
    nothing writes to it.

    Args:
        model: in eval mode.
        example: its inputs.
        first: the graph for the example's batch size.

    Raises:
        Exception: the model cannot be copied in this way.

    Example:
        >>> model, x = nn.Linear(4, 2), torch.ones(1, 4)
        >>> others = OtherSizes(model, x, capture(model, x, any_batch=False))
        >>> others.find({}, None, torch.ones(3, 4)).captured.accepts(torch.ones(5, 4))
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
        self._values = {str(node.target): value for node, value in values.items()}
        state = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        # A capture reads the values of other tensors, such as masks of attention.
        weights = {name.partition("@")[0] for name in self._layers}
        zeros = {id(tensor): zeros_like(tensor) for name, tensor in state if name in weights}
        self._names = {name for name, _ in state}
        self._zeros = {tensor.untyped_storage().data_ptr() for tensor in zeros.values()}
        self._model = copy.deepcopy(model, {id(tensor): tensor for _, tensor in state} | zeros)
        self._example = like(example, [zeros_like(x) for x in tensors_of(example)])
        self._found: dict[int, Planned | None] = {}

    def find(self, tuning: Tuning, chunk_size: int | None, *given: Tensor) -> Planned | None:
        """Return a graph for any batch size; None if the model may depend on the batch size.

        The first call takes seconds. If the graph is not known to hold for a single sample, the
        first call with one compares it with the graph for one, which takes seconds again.

        Args:
            tuning: how each layer runs, by the name of its weight.
            chunk_size: number of samples to process together, if the graph keeps samples apart.
            given: inputs for which the graph must hold.
        """
        batch = len(tensors_of(self._example)[0])
        for size in (batch, 1) if len(given[0]) == 1 < batch else (batch,):
            if size not in self._found:
                with torch.inference_mode(False), torch.no_grad():
                    self._found[size] = self._find(size, tuning, chunk_size)
            found = self._found[size]
            if found is not None and found.captured.accepts(*given):
                return found
        return None

    def _find(self, size: int, tuning: Tuning, chunk_size: int | None) -> Planned | None:
        example = like(self._example, [x[:size] for x in tensors_of(self._example)])
        try:
            with torch.autocast("cpu", enabled=False):
                captured = capture(self._model, example)
        except CaptureError:
            return None
        graph = captured.module.graph
        batch = next(n for n in graph.nodes if n.op == "placeholder").meta["val"].shape[0]
        values = attributes(captured.module)
        if isinstance(batch, int) or not self._set_weights(captured, values):
            return None
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
        for layer in called_layers(plan):  # they may run sparse for the example's size
            layer.fold()
        if chunk_size is not None and samples_of(graph, values, batch) is None:
            chunk_size = None
        named = {node.name: value for node, value in values.items()}
        return Planned(captured, plan, named, chunk_size)

    def _set_weights(self, captured: Captured, values: dict[Any, Any]) -> bool:
        """Give the layers and constants of a graph the values of the first one.

        Returns:
            Whether the first graph has all of them.
        """
        for node in captured.module.graph.nodes:
            if isinstance(node.target, Layer | Recurrent):
                known = self._layers.get(node.target.name)
                if known is None or not _is_same(known, node.target):
                    return False
                node.target = known
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


def _is_same(a: Layer | Recurrent, b: Layer | Recurrent) -> bool:
    """Return whether two layers differ in the values of their weights at most."""
    shapes = [
        [w.shape for w in (x.weights if isinstance(x, Recurrent) else [x.weight])] for x in (a, b)
    ]
    return (type(a), shapes[0], a.options) == (type(b), shapes[1], b.options)
