"""Processing a batch in chunks: parts of the inputs, the graph for one sample, and the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .errors import InputError
from .samples import Rows, Samples

aten = torch.ops.aten
# Functions that name all sizes of their result, and the functions that replace them.
SIZED: dict[Any, Any] = {
    **dict.fromkeys((aten.reshape.default, aten.view.default), aten.reshape.default),
    **dict.fromkeys((aten._unsafe_view.default, aten.unflatten.int), aten.reshape.default),
    aten.expand.default: aten.expand.default,
}


def split(inputs: Sequence[Tensor], size: int | None) -> list[Sequence[Tensor]]:
    """Return the inputs of each chunk of a batch.

    Args:
        inputs: those of the batch.
        size: number of samples of a chunk; None for the whole batch.

    Example:
        >>> [len(x) for (x,) in split([torch.ones(5, 3)], size=2)]
        [2, 2, 1]
    """
    if size is None or len(inputs[0]) <= size:
        return [inputs]
    return list(zip(*(x.split(size) for x in inputs), strict=True))


def concatenated(*values: Any) -> Any:
    """Return one output of the whole batch from those of its chunks.

    Raises:
        InputError: an output that is no tensor differs between the chunks.

    Example:
        >>> concatenated(torch.ones(2), torch.ones(1))
        tensor([1., 1., 1.])
    """
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if any(value != values[0] for value in values):
        raise InputError(
            f"The model returned {', '.join(map(repr, values))} for the chunks of a batch, which "
            "does not determine the output for the whole batch. Compile it without chunk_size."
        )
    return values[0]


def check_chunks(shapes: Callable[..., Sequence[Any]], inputs: Sequence[Tensor]) -> None:
    """Check that the outputs for parts of a batch can be concatenated.

    Args:
        shapes: function of the inputs that returns the shapes of the outputs.
        inputs: those of the example.

    Raises:
        InputError: the first dimension of an output is not the batch.

    Example:
        >>> check_chunks(lambda x: [x.shape], [torch.ones(2, 3)])
    """
    for batch in (2, 3):
        given = [torch.empty(batch, *x.shape[1:], dtype=x.dtype, device="cpu") for x in inputs]
        for shape in shapes(*given):
            if shape is not None and shape[:1] != (batch,):
                raise InputError(
                    "chunk_size requires outputs whose first dimension is the batch, but the model "
                    f"returns {tuple(shape)} for {batch} samples. Compile it without chunk_size."
                )


def for_one_sample(
    graph: Graph, constants: Mapping[Node, Any], samples: Samples
) -> tuple[Graph, dict[Node, Any]]:
    """Return the graph that computes for one sample what a graph computes for each of a batch.

    It is not captured again: the model may behave differently for a single sample, and a capture
    takes longer than the rest.

    Args:
        graph: a captured graph, all sizes of which are numbers.
        constants: values of its nodes that do not depend on the input.
        samples: where the samples are in its values.

    Returns:
        The graph, and the values of its nodes that do not depend on the input.

    Example:
        >>> from .independence import samples_of
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> x.meta["val"] = torch.ones(2, 3)
        >>> y = graph.call_function(aten.reshape.default, (x, [2, 3, 1]))
        >>> y.meta["val"] = torch.ones(2, 3, 1)
        >>> _ = graph.output(y)
        >>> found, _ = for_one_sample(graph, {}, samples_of(graph, {}, batch=2))
        >>> [node.args[1] for node in found.nodes if node.op == "call_function"]
        [[1, 3, 1]]
    """
    found, nodes, values = Graph(), dict[Node, Node](), dict[Node, Any]()
    for node in graph.nodes:
        new = nodes[node] = found.node_copy(node, nodes.__getitem__)
        if node in constants:
            values[new] = constants[node]
        if node in samples.shared:
            rows, value = samples.shared[node], constants[node]
            batch = value.shape[rows.dim] // rows.per_sample
            values[new] = new.meta["val"] = rows.of_one(value, batch)
        elif node in samples.rows:
            new.meta["val"] = _of_one(node.meta["val"], samples.rows[node])
            if node.target in SIZED:
                new.target, new.kwargs = SIZED[node.target], {}
                new.args = (new.args[0], list(new.meta["val"].shape))
    return found, values


def _of_one(value: Any, rows: Any) -> Any:
    """Return tensors without values that are like those of one sample."""
    if not isinstance(rows, Rows):
        return [_of_one(v, r) for v, r in zip(value, rows, strict=True)]
    shape = list(value.shape)
    shape[rows.dim] = rows.per_sample
    return torch.empty(shape, dtype=value.dtype, device="meta")
