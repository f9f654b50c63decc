"""Capture of a model as a graph of functions."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.fx.experimental import _config as config
from torch.utils._pytree import TreeSpec, tree_map

from .checks import CAPTURING
from .errors import CaptureError
from .fusion import fuse, graphs_of, reads_memory
from .in_place import may_write_into_input, without_writes
from .inputs import Example, arguments, like, tensors_of
from .one_sample import holds_for_one
from .strides import ShapeModel
from .traced import replaced_in, restore
from .unrolled import has_recurrent, known_shapes

aten = torch.ops.aten
# PyTorch's recurrent layers assign their weights to themselves; other assignments are reported.
RECURRENT = (
    r"The tensor attributes? (\S+\._flat_weights\[\d+\](, )?)+ w(as|ere) assigned during export"
)
STACK_TRACES = "do_not_emit_stack_traces"  # a private option of torch.fx
SIZE_OBLIVIOUS = "backed_size_oblivious"  # a private option of PyTorch, see _guard_batch_of_one


class Captured(NamedTuple):
    """A graph that computes the same as the model.

    Attributes:
        module: the graph; its layers are fused, see `fusion`.
        accepts: whether the graph is valid for this batch of at least one sample. A model may
            behave differently for other batch sizes.
        spec: structure of the model's output, whose leaves are what the graph returns.
        shapes: the strides of these tensors.
        reads_memory: whether the input must be contiguous and no part of another tensor.

    Example:
        >>> captured = capture(nn.ReLU(), torch.ones(3, 4))
        >>> captured.accepts(torch.ones(5, 4)), captured.reads_memory
        (True, False)
    """

    module: GraphModule
    accepts: Callable[..., bool]
    spec: TreeSpec
    shapes: ShapeModel
    reads_memory: bool


def capture(
    model: nn.Module, example: Example, *, any_batch: bool = True, decompose: bool = False
) -> Captured:
    """Capture a model in eval mode as a graph in which layers and batch norms are fused.

    Args:
        model: the model.
        example: its inputs.
        any_batch: whether to try a graph for all batch sizes first; otherwise, all sizes of the
            graph are those of the example.
        decompose: whether to split composite functions into those of PyTorch's smaller sets.

    Raises:
        CaptureError: torch.export cannot capture the model, or the model writes into its input.

    Example:
        >>> graph = capture(nn.ReLU(), torch.ones(3, 4)).module.graph
        >>> [node.target for node in graph.nodes if node.op == "call_function"]
        [<OpOverload(op='aten.relu', overload='default')>]
    """
    given = tensors_of(example)
    found = None
    if any_batch:
        # torch.export specializes the graph for a batch of one.
        several = like(example, _several(given))
        with suppress(Exception), _guard_batch_of_one():  # of many types, none documented
            program = _export(model, several, {0: torch.export.Dim.AUTO})
            found = _captured(model, program, several, decompose)
            if found.accepts(*given):
                return found
    try:
        one = _export(model, example, None)
        if found and len(given[0]) == 1:
            restore(one.graph)
            if holds_for_one(program, one):
                return _captured(model, program, several, decompose, one_sample=True)
        return _captured(model, one, example, decompose)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {error}"
        ) from error


def _several(given: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat([x, x]) if len(x) == 1 else x for x in given]


def _guard_batch_of_one() -> AbstractContextManager[object]:
    """Make torch.export record guards that hold for several samples only.

    Otherwise it assumes them. If PyTorch removes the option, `Captured.accepts` rejects a single
    sample.
    """
    if not hasattr(config, SIZE_OBLIVIOUS):
        return nullcontext()
    return config.patch({SIZE_OBLIVIOUS: True})  # type: ignore[attr-defined]


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Let torch.export record no stack traces, which takes a tenth of the time."""
    before = getattr(torch.fx.config, STACK_TRACES, None)
    if before is not None:
        setattr(torch.fx.config, STACK_TRACES, True)
    try:
        yield
    finally:
        if before is not None:
            setattr(torch.fx.config, STACK_TRACES, before)


def _export(model: nn.Module, example: Example, sizes: dict[int, Any] | None) -> ExportedProgram:
    with CAPTURING, replaced_in(model), _without_stack_traces(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", RECURRENT)
        args, kwargs = arguments(example)
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        shapes = sizes and tree_map(lambda _: sizes, dict(bound))
        with known_shapes() as recurrent:
            found = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
        if recurrent and not has_recurrent(found.graph):  # their steps are in the graph
            found = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
        return found


def _captured(
    model: nn.Module,
    program: ExportedProgram,
    example: Example,
    decompose: bool,
    one_sample: bool = False,
) -> Captured:
    """Return the fused graph of an exported model.

    Args:
        one_sample: whether the graph is known to be valid for a batch of one, so that guards are
            evaluated for two.
    """
    tensors = tensors_of(example)
    shapes = ShapeModel(model, program, tuple(arguments(example)[1]))
    if may_write_into_input(program.graph) and (writer := shapes.write_into_input(*tensors)):
        raise CaptureError(
            f"{type(model).__name__} writes into its input in-place ({writer}). A compiled network "
            "does not change its input. Construct this layer with inplace=False, or copy the input "
            "first (x = x.clone())."
        )
    module = _functional(model, program, decompose)
    batch = next(n for n in module.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
    guards: Any = getattr(module, "_guards_fn", None)
    squeezed = [size for part in graphs_of(module) for size in _squeezed_sizes(part.graph)]

    def accepts(*given: Tensor) -> bool:
        given = tuple(_several(given)) if one_sample else given
        x = given[0]
        try:
            if guards is not None:
                guards(*given)
        except (AssertionError, NameError):  # guards of `**kwargs` lack their names in PyTorch 2.14
            return False
        if isinstance(batch, int):
            return len(x) == batch
        if any(size.node.expr.subs(batch.node.expr, len(x)) == 1 for size in squeezed):
            return False
        return len(x) > 1 or hasattr(config, SIZE_OBLIVIOUS)

    spec = program.call_spec.out_spec
    in_order = reads_memory(module)
    if in_order and not all(x.is_contiguous() for x in tensors):
        raise CaptureError(
            f"{type(model).__name__} calls as_strided, so the example must be contiguous, got "
            f"strides {', '.join(str(x.stride()) for x in tensors)}. Pass example.contiguous()."
        )
    fused = fuse(module, activations=not decompose)
    return Captured(fused, accepts, spec, shapes, in_order)


def _functional(model: nn.Module, program: ExportedProgram, decompose: bool) -> GraphModule:
    """Return the graph of an exported model without writes into tensors."""
    module = program.module()
    assert isinstance(module, GraphModule)
    restore(module.graph)
    if not decompose and without_writes(module.graph):
        return module
    restore(program.graph)
    with CAPTURING:
        program = program.run_decompositions({})
    if changed := program.graph_signature.buffers_to_mutate:
        raise CaptureError(
            f"{type(model).__name__} changes its buffers in eval mode "
            f"({', '.join(changed.values())}). A compiled network has no state: remove these "
            "changes."
        )
    module = program.module()
    assert isinstance(module, GraphModule)
    return module


def _squeezed_sizes(graph: Graph) -> Iterator[torch.SymInt]:
    """Yield sizes of squeezed dimensions that depend on the batch size.

    torch.export assumed that they are not 1.
    """
    for node in graph.nodes:
        if getattr(node.target, "overloadpacket", None) is aten.squeeze:
            shape = node.args[0].meta["val"].shape
            dims = node.args[1] if len(node.args) > 1 else range(len(shape))
            for dim in [dims] if isinstance(dims, int) else dims:
                if shape and not isinstance(shape[dim], int):
                    yield shape[dim]
