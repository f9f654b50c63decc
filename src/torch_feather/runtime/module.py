"""Compilation of a network, and the compiled network as a module."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from ..deprecation import renamed_argument, warn_renamed
from ..errors import StateError
from .batch import BatchPlan
from .capture import Captured
from .checks import (
    NOT_LOADED,
    NOT_SAVED,
    NOT_TRACED,
    check_contiguous,
    check_count,
    check_eager,
    check_types,
    copy_in_eval_mode,
    fail_for_empty_batch,
    result_of_empty_batch,
)
from .chunks import check_chunks, concatenated, split
from .constants import constants_of_module
from .errors import InputError
from .forms import Form, choose_form
from .inputs import Example, Inputs, arguments, tensors_of
from .kernels import Tile
from .memory import without_collections
from .other_sizes import Planned, capture_example
from .ownership import Ownership
from .strides import with_strides
from .tuning import LayerTuning, Tuning, table
from .tuning_file import load_tuning, save_tuning
from .workspace import WorkspacePool

ChunkSize = int | Literal["auto"] | None
MAX_SIZES = 4  # number of input sizes for which tables and memory are kept


def _checked(chunk_size: int | str) -> int:
    if isinstance(chunk_size, str):
        raise InputError(f'chunk_size must be a number, "auto" or None, got {chunk_size!r}.')
    return check_count("chunk_size", chunk_size)


def compile_sparse(
    model: nn.Module,
    example_input: Example,
    *,
    threads: int | None = None,
    tuning: Tuning | str | Path | None = None,
    chunk_size: ChunkSize = "auto",
    choices: Tuning | str | Path | None = None,
    at_a_time: int | None = None,
) -> SparseModule:
    """Compile a network for inference on this CPU, with layers that skip zero weights.

    Without `tuning`, each layer is timed densely and sparsely. Then the whole network is timed with
    the faster way of each layer, with all layers sparse, and with all layers dense. The fastest of
    the three is used, so a layer may run in the way that is slower for the layer alone.

    Inputs of other sizes are accepted if the model accepts them. The first one of a size takes
    seconds, because the model is captured again, but once for all batch sizes if possible.

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
        chunk_size: number of samples that the network processes together; None for the whole batch.
            "auto": the faster of one sample and the whole batch of the example; one only if the
            captured graph shows that no sample affects another one. Numbers are used unchecked.
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


class _Run(NamedTuple):
    """A captured graph, and what executes its plan for some sizes of the inputs."""

    captured: Captured
    pool: WorkspacePool


class SparseModule(nn.Module):
    """A network that `compile_sparse` compiled.

    Several threads may call it concurrently. It works on this kind of processor only, and has no
    parameters to train. `save_compiled` saves it. Its `repr` is a table of its layers.

    Attributes:
        tuning: how each layer runs, by the name of its weight.
        threads: number of threads of the sparse layers. It may be set between calls; the way each
            layer runs stays the one that was measured with the former number.
        chunk_size: number of samples that are processed together, as given or as chosen; None for
            whole batches.
        given_chunk_size: the number that was given as `chunk_size`; None if none was.
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
        chunk_size: ChunkSize,
    ) -> None:
        super().__init__()
        is_auto = chunk_size == "auto"
        self.given_chunk_size = None if is_auto or chunk_size is None else _checked(chunk_size)
        known = load_tuning(tuning) if isinstance(tuning, str | Path) else tuning
        self.inputs, given = Inputs.of(example), tensors_of(example)
        self.threads, self.shape, self.batch_size = threads, self.inputs.shapes[0], len(given[0])
        model = copy_in_eval_mode(model)
        check_types(model, *given)
        args, kwargs = arguments(example)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            ownership = Ownership(model)
            self.captured, self._others = capture_example(model, example, ownership)
            if self.given_chunk_size is not None:
                check_chunks(self.captured.shapes.output_shapes, given)
            self._empty_result = result_of_empty_batch(model, *args, **kwargs)
            graph, values = self.captured.module.graph, constants_of_module(self.captured.module)
            form = Form(graph, values, self.batch_size, self.threads)
            form, self.tuning = choose_form(form, given, known, may_split=is_auto)
            self.plan, self.constants = form.plan(self.tuning), form.constants
            self._chosen = form.chunk_size
            for layer in form.layers.values():
                layer.packs = self.tuning[layer.name].packs
                layer.free_packed()
            ownership.own_layers(self.captured.module, self.plan)
        self._start()

    def _start(self) -> None:
        self._runs: OrderedDict[tuple[tuple[torch.Size, ...], int], _Run] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def restored(cls, **attributes: Any) -> SparseModule:
        """Return a network with these attributes; it does not accept an empty batch.

        Args:
            attributes: see the class, without `shape` and `chunk_size`; `chosen`: chunk size of the
                plan.
        """
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        network.threads = attributes.pop("threads")
        network._chosen = attributes.pop("chosen")
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

    @property
    def chunk_size(self) -> int | None:
        return self._chosen if self.given_chunk_size is None else self.given_chunk_size

    def batch_plan(self, batch: int, planned: Planned | None = None) -> BatchPlan:
        """Return the plan for a batch size: of the whole batch, or of one of its chunks.

        Args:
            batch: number of samples.
            planned: what `planned` returned for this number. [default: for the example's]
        """
        planned = self._of_example() if planned is None else planned
        tiles: dict[str, Tile] = {name: layer.tile for name, layer in self.tuning.items()}
        count = min(batch, planned.chunk_size or batch)
        return BatchPlan(planned.plan, planned.constants, count, tiles, self.threads)

    def _of_example(self) -> Planned:
        return Planned(self.captured, self.plan, self.constants, self._chosen)

    def planned(self, *given: Tensor) -> Planned:
        """Return the graph and the plan for inputs; it may hold for other batch sizes, too.

        Raises:
            InputError: there is none.
        """
        if self.inputs.have_sizes_of(given) and self.captured.accepts(*given):
            return self._of_example()
        if self._others is not None:
            return self._others.find(self.tuning, self._chosen, given)
        raise InputError(
            f"The network was compiled for a batch of {self.batch_size}, not of {len(given[0])}. "
            "It was loaded from a file, or its model cannot be captured again. Compile another "
            "network with an example of this size."
        )

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Compute the model's output in float32.

        Its tensors have the strides of the model's own, so they can be viewed in the same ways.

        Args:
            args: inputs like those of the example, of any size that the model accepts.
            kwargs: inputs by name, if the example was a dictionary.

        Raises:
            InputError: an input has another type or number of dimensions, or a size for which the
                model cannot be captured.
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
        self.inputs.check(given, any_size=self._others is not None)
        if not len(given[0]):
            return self._empty_result()
        parts, captured = [], self.captured
        for chunk in split(given, self.given_chunk_size):
            run = self._for_sizes(*chunk)
            captured = run.captured
            if captured.reads_memory:
                for x in given:
                    check_contiguous(x)
            parts += [run.pool(*part) for part in split(chunk, run.pool.plan.batch)]
        values = parts[0] if len(parts) == 1 else map(concatenated, *parts)
        with self._lock:
            strides = captured.shapes.output_strides(*given)
        found = [
            v if s is None or not isinstance(v, Tensor) else with_strides(v, s)
            for v, s in itertools.zip_longest(values, strides)
        ]
        return tree_unflatten(found, captured.spec)

    def _for_sizes(self, *given: Tensor) -> _Run:
        """Return what executes the plan for inputs of these sizes, or for chunks of them.

        Raises:
            InputError: there is no plan.
        """
        with self._lock:
            key = tuple(x.shape for x in given), self.threads
            if key not in self._runs:
                planned = self.planned(*given)
                plan = self.batch_plan(len(given[0]), planned)
                alike = (r.pool for r in self._runs.values() if r.pool.plan.is_like(plan))
                pool = next(alike, None) or WorkspacePool(plan)
                self._runs[key] = _Run(planned.captured, pool)
                while len(self._runs) > MAX_SIZES:
                    self._runs.popitem(last=False)
            self._runs.move_to_end(key)
            return self._runs[key]

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
        return table(self.tuning, self.plan, self.chunk_size)

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
