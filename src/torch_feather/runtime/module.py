"""Compilation of a network, and the compiled network as a module."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_unflatten

from ..deprecation import renamed_argument, warn_renamed
from ..errors import StateError
from .batch import BatchPlan
from .checks import (
    NOT_LOADED,
    NOT_SAVED,
    NOT_TRACED,
    check_chunks,
    check_count,
    check_eager,
    check_types,
    copy_in_eval_mode,
    fail_for_empty_batch,
    result_of_empty_batch,
)
from .constants import constants_of_module
from .errors import InputError
from .inputs import Example, Inputs, arguments, concatenated, tensors_of
from .kernels import Tile
from .layer import Layer
from .memory import return_freed_memory, without_collections
from .other_sizes import Planned, capture_example
from .ownership import Ownership
from .plan import Plan, Sparse, can_run_sparse
from .recurrent import Recurrent
from .strides import with_strides
from .timing import milliseconds
from .tuning import LayerTuning, Tuning, distinct_ways, table, tune_layer
from .tuning_file import load_tuning, save_tuning
from .workspace import WorkspacePool

MAX_BATCH_SIZES = 4  # number of batch sizes for which tables and memory are kept


def compile_sparse(
    model: nn.Module,
    example_input: Example,
    *,
    threads: int | None = None,
    tuning: Tuning | str | Path | None = None,
    chunk_size: int | None = None,
    choices: Tuning | str | Path | None = None,
    at_a_time: int | None = None,
) -> SparseModule:
    """Compile a network for inference on this CPU, with layers that skip zero weights.

    Without `tuning`, each layer is timed densely and sparsely. Then the whole network is timed with
    the faster way of each layer, with all layers sparse, and with all layers dense. The fastest of
    the three is used, so a layer may run in the way that is slower for the layer alone.

    Any batch size is accepted if `torch.export` can show that the model's behavior is independent
    of it; the first batch of another size takes seconds. Otherwise, other sizes raise `InputError`.

    Args:
        model: on the CPU, in float32. It is not changed. Later changes of the model do not affect
            the compiled network.
        example_input: a tensor (batch, ...) of float32 or integers, a tuple of tensors for several
            positional inputs, or a dictionary of tensors for inputs by name. Layers are timed with
            its batch size.
        threads: number of threads of the sparse layers; the others use PyTorch's number.
            [default: torch.get_num_threads()]
        tuning: results of another compiled network (`SparseModule.tuning`), or a file that
            `SparseModule.save_tuning` wrote, also on another machine. Layers that it does not name
            are timed. [default: all layers are timed]
        chunk_size: number of samples that the network processes together. Only for networks that
            process the samples of a batch independently. Activations of small chunks fit into the
            caches. [default: the whole batch]
        choices: deprecated name of `tuning`.
        at_a_time: deprecated name of `chunk_size`.

    Returns:
        A module that computes what `model` computes in eval mode.

    Raises:
        InputError: the example is not a batch of float32 on the CPU, the model is not float32 on
            the CPU, `threads` or `chunk_size` is invalid, or an output cannot be chunked.
        FileFormatError: the tuning file is damaged.
        CaptureError: torch.export cannot capture the model, or the model writes into its input.
        RuntimeMissingError: llvmlite is not installed.

    Example:
        >>> import torch, torch_feather as feather
        >>> model = torch.nn.Linear(64, 8)
        >>> _ = model.weight.data.mul_(torch.rand(8, 64) < 0.05)
        >>> sparse = feather.compile_sparse(model, torch.zeros(1, 64), threads=1)
        >>> sparse(torch.zeros(3, 64)).shape
        torch.Size([3, 8])
    """
    tuning = renamed_argument("compile_sparse", "choices", choices, "tuning", tuning)
    chunk_size = renamed_argument(
        "compile_sparse", "at_a_time", at_a_time, "chunk_size", chunk_size
    )
    threads = torch.get_num_threads() if threads is None else threads
    return SparseModule(model, example_input, threads, tuning, chunk_size)


class SparseModule(nn.Module):
    """A network that `compile_sparse` compiled.

    Several threads may call it concurrently. It works on this kind of processor only, and has no
    parameters to train. `save_compiled` saves it. Its `repr` is a table of its layers.

    Attributes:
        tuning: how each layer runs, by the name of its weight.
        threads: number of threads of the sparse layers. It may be set between calls; the way each
            layer runs stays the one that was measured with the former number.
        chunk_size: number of samples that are processed together; None for whole batches.
        shape: shape of one sample of the (first) input.
        inputs: names, shapes and types of all inputs.
        batch_size: number of samples of the example.
        captured: the graph of the model.
        constants: values of the nodes that do not depend on the input, by name.
        plan: the steps of the network.

    Example:
        >>> import torch_feather as feather
        >>> sparse = feather.compile_sparse(nn.Linear(64, 8), torch.zeros(1, 64), threads=1)
        >>> list(sparse.tuning), sparse.shape
        (['weight'], (64,))
    """

    @without_collections()
    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        example: Example,
        threads: int,
        tuning: Tuning | str | Path | None,
        chunk_size: int | None,
    ) -> None:
        super().__init__()
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        known = load_tuning(tuning) if isinstance(tuning, str | Path) else tuning
        self.inputs, given = Inputs.of(example), tensors_of(example)
        self.threads, self.chunk_size, self.shape = threads, chunk_size, self.inputs.shapes[0]
        self.batch_size = len(given[0])
        model = copy_in_eval_mode(model)
        check_types(model, *given)
        args, kwargs = arguments(example)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            ownership = Ownership(model)
            self.captured, self._others = capture_example(model, example, ownership)
            if chunk_size is not None:
                check_chunks(self.captured.shapes.output_shapes, given)
            self._empty_result = result_of_empty_batch(model, *args, **kwargs)
            self._values = constants_of_module(self.captured.module)
            self.constants = {node.name: value for node, value in self._values.items()}
            nodes, self._plans = self._layer_nodes(), dict[tuple[str, ...], Plan]()
            self.tuning = self._tune(nodes, known or {})
            if known is None:
                self.tuning = self._fastest(list(nodes.values()), given)
            self.plan = self._plan(list(nodes.values()), self.tuning)
            for layer in nodes.values():
                layer.packs = self.tuning[layer.name].packs
            ownership.own_layers(self.captured.module, self.plan)
        del self._plans, self._values
        self._start()

    def _start(self) -> None:
        self._pools: OrderedDict[tuple[int, int], WorkspacePool] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def restored(cls, **attributes: Any) -> SparseModule:
        """Return a network with these attributes; it does not accept an empty batch.

        Args:
            attributes: see the class, without `shape`.
        """
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        network.threads = attributes.pop("threads")
        network.__dict__.update(attributes, shape=attributes["inputs"].shapes[0], _others=None)
        network._empty_result = fail_for_empty_batch
        network._start()
        return network

    @property
    def threads(self) -> int:
        return self._threads

    @threads.setter
    def threads(self, number: int) -> None:
        self._threads = check_count("threads", number)

    def batch_plan(self, batch: int, planned: Planned | None = None) -> BatchPlan:
        """Return the plan for a batch size.

        Args:
            batch: number of samples.
            planned: what `planned` returned for this number. [default: for the example's]
        """
        plan, constants = (self.plan, self.constants) if planned is None else planned[1:]
        return self._batch_plan(plan, self.tuning, batch, constants)

    def planned(self, *given: Tensor) -> Planned:
        """Return the graph and the plan for inputs.

        Raises:
            InputError: the model may behave differently for this batch size.
        """
        if self.captured.accepts(*given):
            return Planned(self.captured, self.plan, self.constants)
        found = self._others and self._others.find(self.tuning)
        if found and found.captured.accepts(*given):
            return found
        raise InputError(
            "As far as torch.export can tell, this model depends on the batch size. It was "
            f"captured for a batch of {self.batch_size}, not of {len(given[0])}. Compile another "
            "module with an example of this size."
        )

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Compute the model's output in float32.

        Its tensors have the strides of the model's own, so they can be viewed in the same ways.

        Args:
            args: inputs like those of the example, with any batch size for which the model behaves
                alike.
            kwargs: inputs by name, if the example was a dictionary.

        Raises:
            InputError: an input has another shape or type, or a batch size for which the model may
                behave differently.
            StateError: PyTorch traces, exports or compiles the call instead of computing it.
        """
        given = self.inputs.tensors(args, kwargs)
        for x in given:
            check_eager(x)
        return self._forward(given)

    @torch.no_grad()
    def _forward(self, given: Sequence[Tensor]) -> Any:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self._forward(given)
        self.inputs.check(given, self.captured.reads_memory)
        if not len(given[0]):
            return self._empty_result()
        if self.chunk_size is not None and len(given[0]) > self.chunk_size:
            chunks = list(zip(*(x.split(self.chunk_size) for x in given), strict=True))
        else:
            chunks = [tuple(given)]
        parts = [self._for_batch(*chunk)(*chunk) for chunk in chunks]
        values = parts[0] if len(parts) == 1 else map(concatenated, *parts)
        with self._lock:
            strides = self.captured.shapes.output_strides(*given)
        found = [
            v if s is None or not isinstance(v, Tensor) else with_strides(v, s)
            for v, s in itertools.zip_longest(values, strides)
        ]
        return tree_unflatten(found, self.captured.spec)

    def _layer_nodes(self) -> dict[Node, Any]:
        """Return the layers that can run sparse."""
        graph = self.captured.module.graph
        given = next(n for n in graph.nodes if n.op == "placeholder").meta["val"]
        return {
            n: n.target
            for n in graph.nodes
            if isinstance(n.target, Layer | Recurrent) and can_run_sparse(n, given.shape[0])
        }

    def _tune(self, nodes: Mapping[Node, Any], known: Tuning) -> dict[str, LayerTuning]:
        """Return how each layer runs; time those that are not known."""
        steps = self._plan_all(list(nodes.values())).steps
        return_freed_memory()
        places: dict[Any, Sparse] = {s.layer: s for s in steps if isinstance(s, Sparse)}
        times, sizes = dict[Any, Any](), (self.batch_size, self.threads)
        return {
            layer.name: known.get(layer.name)
            or tune_layer(node, layer, *sizes, places.get(layer.kernel_form), times)
            for node, layer in nodes.items()
        }

    def _plan_all(self, layers: Sequence[Any]) -> Plan:
        names = tuple(layer.name for layer in layers)
        if names not in self._plans:
            graph = self.captured.module.graph
            self._plans[names] = Plan.build(graph, layers, self._values)
        return self._plans[names]

    def _plan(self, layers: Sequence[Any], tuning: Tuning) -> Plan:
        return self._plan_all([layer for layer in layers if tuning[layer.name].sparse])

    def _batch_plan(
        self, plan: Plan, tuning: Tuning, batch: int, constants: Mapping[str, Any]
    ) -> BatchPlan:
        tiles: dict[str, Tile] = {name: layer.tile for name, layer in tuning.items()}
        return BatchPlan(plan, constants, batch, tiles, self.threads)

    def _fastest(self, layers: Sequence[Any], given: Sequence[Tensor]) -> dict[str, LayerTuning]:
        """Time the whole network tuned, with all layers sparse, and with all layers dense.

        The times of single layers do not include conversions between layouts.
        """
        tuned = self.tuning
        sparse = {n: replace(t, sparse=t.sparse_ms is not None) for n, t in tuned.items()}
        dense = {n: replace(t, sparse=False) for n, t in tuned.items()}

        def time(tuning: Tuning) -> float:
            plan = self._plan(layers, tuning)
            run = WorkspacePool(self._batch_plan(plan, tuning, self.batch_size, self.constants))
            took = milliseconds(partial(run, *given), min_total=100.0)
            for layer in layers:
                layer.free_packed()
            return took

        fastest: Tuning = min(distinct_ways(tuned, sparse, dense), key=time)
        return dict(fastest)

    def _for_batch(self, *given: Tensor) -> WorkspacePool:
        """Return the function that executes the plan for the batch size of inputs."""
        batch = len(given[0])
        with self._lock:
            key = batch, self.threads
            if key not in self._pools:
                self._pools[key] = WorkspacePool(self.batch_plan(batch, self.planned(*given)))
                while len(self._pools) > MAX_BATCH_SIZES:
                    self._pools.popitem(last=False)
            self._pools.move_to_end(key)
            return self._pools[key]

    def __reduce_ex__(self, protocol: object) -> Any:
        raise StateError(NOT_SAVED)

    def __prepare_scriptable__(self) -> Any:
        raise StateError(NOT_TRACED)  # torch.jit.script calls this

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raise an error: a compiled network has no state.

        Raises:
            StateError: always.
        """
        raise StateError(NOT_SAVED)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raise an error: a compiled network has no state, so nothing would be loaded.

        Raises:
            StateError: always.
        """
        raise StateError(NOT_LOADED)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Raise the same error if a module that contains this one is loaded."""
        raise StateError(NOT_LOADED)

    def save_tuning(self, path: str | Path) -> None:
        """Write the tuning results as JSON, for `compile_sparse(..., tuning=path)`.

        Args:
            path: the file, which is replaced atomically.
        """
        save_tuning(self.tuning, path)

    def extra_repr(self) -> str:
        """Return a table of the layers, their times, and how they run."""
        return table(self.tuning, self.plan)

    # Names of version 0.1

    @property
    def choices(self) -> dict[str, LayerTuning]:
        """Deprecated name of `tuning`."""
        warn_renamed("SparseModule.choices", "tuning")
        return self.tuning

    @property
    def at_a_time(self) -> int | None:
        """Deprecated name of `chunk_size`."""
        warn_renamed("SparseModule.at_a_time", "chunk_size")
        return self.chunk_size

    def save_choices(self, path: str | Path) -> None:
        """Deprecated name of `save_tuning`."""
        warn_renamed("SparseModule.save_choices", "save_tuning")
        self.save_tuning(path)
