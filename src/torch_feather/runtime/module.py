"""The compiled network as a module."""

from __future__ import annotations

import copy
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import FileFormatError, StateError
from ..files import replace_file
from ..prunable import unwrap
from .bound import Bound, InputError
from .capture import CaptureError, attributes, capture
from .choose import Choice, choose
from .kernels import Tile
from .layer import Layer
from .plan import Plan, Sparse, Torch, suits
from .timing import milliseconds

BATCH_SIZES = 4  # for which tables are kept


def compile_sparse(
    model: nn.Module,
    example_input: Tensor,
    *,
    threads: int | None = None,
    choices: Mapping[str, Choice] | str | Path | None = None,
    at_a_time: int | None = None,
) -> SparseModule:
    """A network that computes what `model` does in eval mode, its sparse layers really sparse.

    Args:
        model: on the CPU, in float32; takes one tensor. It is not changed, and the result does
            not change with it.
        example_input: (batch, ...); other batch sizes will do too. Layers are timed with it.
        threads: for the sparse layers; all others run with PyTorch's own number.
            [default: torch.get_num_threads()]
        choices: those of another module or `save_choices`, of any machine; layers that they do
            not name are timed. [default: every layer is timed]
        at_a_time: samples that go through the network together, for networks that treat the
            samples of a batch by themselves. A few at a time stay in the caches, where whole
            batches do not. [default: all of a batch]

    Raises:
        InputError: the example is no batch of float32 tensors on the CPU, or the model is not.
        FileFormatError: the file of choices is damaged.
        CaptureError: torch.export cannot follow the model.
        RuntimeMissingError: llvmlite is not installed.
    """
    threads = torch.get_num_threads() if threads is None else threads
    return SparseModule(model, example_input, threads, choices, at_a_time)


class SparseModule(nn.Module):
    """See `compile_sparse`. Calls may come from several threads at a time.

    It is made for this machine and process, and has no parameters to train or save.

    Attributes:
        choices: how each layer runs, by the name of its weight.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        threads: int,
        choices: Mapping[str, Choice] | str | Path | None,
        at_a_time: int | None,
    ) -> None:
        super().__init__()
        for name, number in (("threads", threads), ("at_a_time", at_a_time)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise InputError(f"{name} must be a whole number of at least 1, not {number!r}")
        self.at_a_time = at_a_time
        batch = isinstance(example, Tensor) and example.dim() > 0 and example.numel() > 0
        if not batch or example.dtype != torch.float32:
            raise InputError("the example must be a batch (batch, ...) of float32, not empty")
        if isinstance(choices, str | Path):
            choices = load_choices(choices)
        self.threads, self.shape = threads, tuple(example.shape[1:])
        try:
            model = copy.deepcopy(unwrap(model)).eval()
        except RuntimeError as error:
            raise CaptureError(
                f"{type(model).__name__} cannot be copied ({error}). Masks of torch.nn.utils.prune "
                "must be made permanent first: prune.remove(module, name)"
            ) from error
        for tensor in (*model.parameters(), *model.buffers(), example):
            if tensor.device.type != "cpu":
                raise InputError(
                    f"compile_sparse is for the CPU, but something is on {tensor.device}; move "
                    "the model and the example there first"
                )
        for name, weight in model.named_parameters():
            if weight.dtype != torch.float32 and weight.is_floating_point():
                raise InputError(
                    f"compile_sparse computes in float32, but {name} is of {weight.dtype}; "
                    "give it copy.deepcopy(model).float()"
                )
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            self._captured = capture(model, example)
            self._of_none = _of_none(model, example)
            read = attributes(self._captured.module)
            self._constants = {node.name: value for node, value in read.items()}
            graph = self._captured.module.graph
            self._batch = len(example)
            given = next(n for n in graph.nodes if n.op == "placeholder").meta["val"]
            found = {
                n: n.target
                for n in graph.nodes
                if isinstance(n.target, Layer) and suits(n, given.shape[0])
            }
            known, layers = choices or {}, list(found.values())
            steps = (s for s in Plan.of(graph, layers).steps if isinstance(s, Sparse))
            grids = {step.layer: step.out.grid.root() for step in steps}
            self.choices = {
                layer.name: known.get(layer.name)
                or choose(node, layer, self._batch, threads, grids.get(layer))
                for node, layer in found.items()
            }
            if choices is None:
                self.choices = self._fastest(layers, example)
            self.plan = self._plan(layers, self.choices)
            for layer in layers:
                if self.choices[layer.name].sparse:
                    layer.unpack()
        self._bound: OrderedDict[int, Bound] = OrderedDict()
        self._lock = threading.Lock()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        """What the model computes, in float32."""
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self.forward(x)
        if not isinstance(x, Tensor) or (
            (tuple(x.shape[1:]), x.dtype, x.layout) != (self.shape, torch.float32, torch.strided)
            or x.device.type != "cpu"
            or x.dim() == 0
        ):
            wanted = ("batch", *self.shape)
            given = type(x).__name__
            if isinstance(x, Tensor):
                given = f"{x.dtype} {tuple(x.shape)}, {x.layout}, on {x.device}"
            raise InputError(
                f"the network was compiled for float32 inputs ({', '.join(map(str, wanted))}) on "
                f"the CPU, this is {given}"
            )
        if not len(x):
            return self._of_none()
        if self.at_a_time is not None and len(x) > self.at_a_time:
            parts = [self.forward(part) for part in x.split(self.at_a_time)]
            return tree_map(_joined, *parts)
        return self._captured.unflatten(self._for_batch(x)(x))

    def _plan(self, layers: Sequence[Layer], choices: Mapping[str, Choice]) -> Plan:
        sparse = [layer for layer in layers if choices[layer.name].sparse]
        return Plan.of(self._captured.module.graph, sparse)

    def _fastest(self, layers: Sequence[Layer], example: Tensor) -> dict[str, Choice]:
        """The choices, or all that can be sparse, or nothing: what it costs to go to and fro
        between sparse and dense layers shows in the whole network only."""
        tried = {n: replace(c, sparse=c.sparse_ms is not None) for n, c in self.choices.items()}
        none = {n: replace(c, sparse=False) for n, c in self.choices.items()}
        times = []
        for choices in (self.choices, tried, none):
            plan = self._plan(layers, choices)
            bound = Bound(plan, self._constants, self._batch, _tiles(choices), self.threads)
            times.append((milliseconds(partial(bound, example), enough=100.0), choices))
        return min(times, key=lambda item: item[0])[1]

    def _for_batch(self, x: Tensor) -> Bound:
        batch = len(x)
        with self._lock:
            if batch not in self._bound:
                if not self._captured.takes(x):
                    raise InputError(
                        "what this model does depends on the batch size, and is known for one of "
                        f"{self._batch}, not of {batch}; compile it with such an example too"
                    )
                self._bound[batch] = Bound(
                    self.plan, self._constants, batch, _tiles(self.choices), self.threads
                )
                while len(self._bound) > BATCH_SIZES:
                    self._bound.popitem(last=False)
            self._bound.move_to_end(batch)
            return self._bound[batch]

    def __reduce_ex__(self, protocol: object) -> Any:
        raise StateError(_NOT_SAVED)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """There is none.

        Raises:
            StateError: always.
        """
        raise StateError(_NOT_SAVED)

    def save_choices(self, path: str | Path) -> None:
        """Write how each layer runs, as JSON, for `compile_sparse(..., choices=path)`."""
        text = json.dumps({name: asdict(choice) for name, choice in self.choices.items()}, indent=1)
        replace_file(Path(path), lambda file: file.write(f"{text}\n".encode()))

    def extra_repr(self) -> str:
        """The table of choices."""
        lines = [f"{'layer':40} sparsity   dense ms  sparse ms  runs"]
        for name, c in self.choices.items():
            times = (c.dense_ms, c.sparse_ms)
            dense, sparse = (" " * 10 if t is None else f"{t:10.3f}" for t in times)
            how = f"sparse, {' x '.join(map(str, c.tile))}" if c.sparse else "dense"
            lines.append(f"{name:40} {100 * c.sparsity:6.2f} % {dense} {sparse}  {how}")
        others = Counter(
            str(step.node.target).removeprefix("aten.")
            for step in self.plan.steps
            if isinstance(step, Torch) and not isinstance(step.node.target, Layer)
        )
        if others:
            told = ", ".join(f"{n} x {name}" if n > 1 else name for name, n in others.items())
            lines.append(f"in PyTorch: {told}")
        return "\n".join(lines)


def load_choices(path: str | Path) -> dict[str, Choice]:
    """What `save_choices` wrote.

    Raises:
        FileFormatError: it did not write this.
    """
    try:
        found = json.loads(Path(path).read_text())
        choices = {name: Choice(**(c | {"tile": Tile(*c["tile"])})) for name, c in found.items()}
        for choice in choices.values():
            times = (t for t in (choice.dense_ms, choice.sparse_ms) if t is not None)
            if min(choice.tile) < 1 or not isinstance(choice.sparse, bool):
                raise ValueError(choice)
            [float(n) for n in (choice.sparsity, *times)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileFormatError(
            f"{path} holds no choices of compile_sparse, or is damaged ({error!r}); compile "
            "without it, and save them anew"
        ) from error
    return choices


_NOT_SAVED = (
    "a compiled network is made for this machine and process, and can be neither saved nor copied: "
    "save the model (feather.save_sparse) and how its layers run (save_choices), and compile again"
)


def _of_none(model: nn.Module, example: Tensor) -> Callable[[], Any]:
    """Gives what the model returns for a batch of 0, which is always the same.

    The graph cannot be asked: torch.export takes it for given that a batch is not empty, and does
    not note which branches of the model it left out for that.
    """
    try:
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for one call
            found = model(example[:0])
    except Exception as error:  # whatever the model does
        message = (
            f"{type(model).__name__} fails on a batch of 0 ({error}), and so does the compiled "
            "network; give it at least one sample"
        )

        def fail() -> Any:
            raise InputError(message)

        return fail
    return lambda: tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, found)


def _joined(*values: Any) -> Any:
    """What the parts of a batch gave, as the whole gives it."""
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if any(value != values[0] for value in values):
        raise InputError(
            f"the model returned {', '.join(map(repr, values))} for parts of a batch, which says "
            "nothing about the whole; compile it without at_a_time"
        )
    return values[0]


def _tiles(choices: Mapping[str, Choice]) -> dict[str, Tile]:
    return {name: choice.tile for name, choice in choices.items()}
