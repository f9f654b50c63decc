"""Whether the graph for several samples is also the graph for one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map_only

SYMBOLIC = (torch.SymInt, torch.SymBool, torch.SymFloat)


def holds_for_one(several: ExportedProgram, one: ExportedProgram) -> bool:
    """Return whether two graphs of one model compute the same for one sample.

    torch.export guards the graph for several samples whenever PyTorch itself asks whether there is
    more than one sample, for example to choose the order of a convolution's result in memory. It
    cannot tell this from a model that behaves differently. If the functions, their arguments and
    the shapes of their results are equal, the model does not.

    Args:
        several: exported with a batch of any size.
        one: exported with a batch of one.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> sizes = {0: torch.export.Dim.AUTO}
        >>> several = torch.export.export(model, (torch.ones(2, 3),), dynamic_shapes=(sizes,))
        >>> holds_for_one(several, torch.export.export(model, (torch.ones(1, 3),)))
        True
    """
    inputs = set(several.graph_signature.user_inputs)
    given = [n for n in several.graph.nodes if n.op == "placeholder" and n.name in inputs]
    sizes = [n.meta["val"].shape[0] for n in given]
    symbols = {size.node.expr for size in sizes if isinstance(size, torch.SymInt)}
    if len(symbols) != 1 or set(several.constants) != set(one.constants):
        return False
    for name, constant in several.constants.items():
        other = one.constants[name]
        if not (isinstance(constant, Tensor) and isinstance(other, Tensor)):
            return False
        if constant.shape != other.shape or not torch.equal(constant, other):
            return False
    return list(_steps(several, symbols.pop())) == list(_steps(one, None))


def _steps(program: ExportedProgram, samples: Any) -> Iterator[tuple[Any, ...]]:
    """Yield each function with its arguments and shapes; sizes are those for one sample.

    Args:
        samples: symbol of the number of samples; None if sizes are numbers.
    """

    def number(value: Any) -> Any:
        if isinstance(value, SYMBOLIC):
            return int(value.node.expr.subs(samples, 1))
        return value

    position: dict[Node, int] = {}
    numbers = itertools.count()

    def argument(node: Node) -> Any:
        if node in position:
            return ("result", position[node])
        return number(node.meta["val"])  # a size

    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and not _has_tensors(value):
            continue  # arithmetic with sizes, and checks of them
        if is_whole(node):  # torch.export omits it if sizes are numbers
            position[node] = position[node.args[0]]
            continue
        position[node] = next(numbers)
        args = tree_map_only(Node, argument, (list(node.args), dict(node.kwargs)))
        args = tree_map_only(SYMBOLIC, number, args)
        shapes = [tuple(map(number, x.shape)) for x in tree_leaves(value) if isinstance(x, Tensor)]
        target = "submodule" if node.op == "get_attr" else node.target
        # Values of submodules, the branches of torch.cond, are not compared.
        yield node.op, target, object() if target == "submodule" else repr(args), shapes


def is_whole(node: Node) -> bool:
    """Return whether a node selects all of a dimension.

    Example:
        >>> from torch.fx import Graph
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> is_whole(graph.call_function(torch.ops.aten.slice.Tensor, (x, 1, 0, 2**63 - 1)))
        True
    """
    args: tuple[Any, ...] = node.args
    if node.target is not torch.ops.aten.slice.Tensor or node.kwargs or len(args) != 4:
        return False
    return bool(args[2] in (None, 0) and isinstance(args[3], int) and args[3] > 2**62)


def _has_tensors(value: Any) -> bool:
    return any(isinstance(x, Tensor) for x in tree_leaves(value))
