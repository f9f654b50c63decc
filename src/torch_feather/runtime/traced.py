"""Functions that are replaced while torch.export captures a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.fx import Graph, GraphModule
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class Replacing(TorchFunctionMode):
    """Replaces functions with others that torch.export captures better.

    Circular padding is computed by concatenation: PyTorch's own function writes into slices of its
    result, for which torch.export requires several samples.

    Batch norms with fixed statistics become one function of this package, see `batch_norm`.

    Example:
        >>> x = torch.arange(3.0).view(1, 1, 3)
        >>> with Replacing():
        ...     F.pad(x, (1, 0), mode="circular")
        tensor([[[2., 0., 1., 2.]]])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.pad and kwargs.get("mode") == "circular" and min(args[1]) >= 0:
            return _pad(*args)
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def replaced_in(model: nn.Module) -> Iterator[None]:
    """Replace functions in calls of a model.

    A mode around torch.export would see each of its own functions, too, which takes a tenth of the
    time. Of graph modules it reads the code of `forward`.

    Args:
        model: the model that torch.export captures.

    Example:
        >>> model = nn.BatchNorm1d(2).eval()
        >>> with torch.no_grad(), replaced_in(model):
        ...     graph = torch.export.export(model, (torch.ones(2, 2),)).graph
        >>> [node.target.name() for node in graph.nodes if node.op == "call_function"]
        ['torch_feather::batch_norm']
    """
    if isinstance(model, GraphModule):
        with Replacing():
            yield
        return
    forward, own = model.forward, vars(model).get("forward")

    # Not hooks: torch.export calls none after an exception.
    @functools.wraps(forward)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        with Replacing():
            return forward(*args, **kwargs)

    model.forward = replaced
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _pad(x: Tensor, sides: Any) -> Tensor:
    for dim, (before, after) in enumerate(zip(sides[::2], sides[1::2], strict=True), 1):
        size = x.shape[-dim]
        ends = x.narrow(-dim, size - before, before), x.narrow(-dim, 0, after)
        x = torch.cat([ends[0], x, ends[1]], -dim)
    return x


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    given = [v for v in (x, mean, var, weight, bias) if v is not None]
    alike = all(type(v) in (Tensor, torch.nn.Parameter) or _is_fake(v) for v in given)
    alike = alike and all(v.dtype == torch.float32 for v in given)
    # Of a batch of any size, the order of the result in memory would depend on the size.
    alike = alike and all(isinstance(n, int) for n in x.shape)
    if training or mean is None or var is None or not alike or x.dim() < 2:
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    found: Tensor = batch_norm()(x, weight, bias, mean, var, eps)
    return found


def _is_fake(value: Tensor) -> bool:
    return isinstance(value, torch._subclasses.FakeTensor)


@functools.cache
def batch_norm() -> Callable[..., Tensor]:
    """Return a function of tensors without values that stands for a batch norm in a graph.

    To find the shape of its result, PyTorch splits its own function into many, which takes a
    quarter of the time of a capture.

    Example:
        >>> batch_norm().name()
        'torch_feather::batch_norm'
    """
    given = "Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps"
    torch.library.define("torch_feather::batch_norm", f"({given}) -> Tensor")

    @torch.library.register_fake("torch_feather::batch_norm")
    def _(x: Tensor, *_: Any) -> Tensor:
        form = suggest_memory_format(x)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=form)

    function: Callable[..., Tensor] = torch.ops.torch_feather.batch_norm.default
    return function


def restore(graph: Graph) -> None:
    """Replace the functions of this package in a graph by PyTorch's.

    Args:
        graph: a graph of torch.export. It is modified.

    Example:
        >>> model = torch.nn.BatchNorm1d(2).eval()
        >>> with torch.no_grad(), Replacing():
        ...     graph = torch.export.export(model, (torch.ones(2, 2),)).graph
        >>> restore(graph)
        >>> [node.target for node in graph.nodes if node.op == "call_function"]
        [<OpOverload(op='aten.batch_norm', overload='default')>]
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target is batch_norm():
            x, weight, bias, mean, var, eps = node.args
            node.target = aten.batch_norm.default
            node.args = (x, weight, bias, mean, var, False, 0.1, eps, True)
