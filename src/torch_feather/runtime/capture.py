"""A model as a graph of functions, with what follows a layer fused into it."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental import _config as config
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_unflatten

from ..errors import FeatherError
from .layer import Layer, MaxPool

aten = torch.ops.aten
BATCH_NORM = aten._native_batch_norm_legit_no_training.default
ONE = "backed_size_oblivious"
CONTIGUOUS = (  # functions that take memory as it lies, and planes lie otherwise
    aten.as_strided.default,
    aten.view_as_complex.default,
    aten.view.dtype,
)


class CaptureError(FeatherError):
    """The model cannot be captured as a graph."""


class Captured(NamedTuple):
    """A graph that computes what the model does.

    Attributes:
        takes: whether it does so for a batch of this size, at least 1; a model may look at it.
        unflatten: makes what the model returns of the list of tensors that the graph does.
    """

    module: GraphModule
    takes: Callable[[Tensor], bool]
    unflatten: Callable[[Any], Any]


def capture(model: nn.Module, example: Tensor) -> Captured:
    """The graph of a model in eval mode; its layers are `Layer`s, batch norms are folded.

    Args:
        model: takes one tensor.
        example: an input.

    Raises:
        CaptureError: torch.export cannot follow the model.
    """
    # A batch of 1 would be taken for a constant.
    several = example if len(example) > 1 else torch.cat([example, example])
    with suppress(Exception), _guarding_one():  # of many types, none documented
        found = _export(model, several, {0: torch.export.Dim.AUTO})
        if found.takes(example):
            return found
    try:
        return _export(model, example, None)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"torch.export cannot follow {type(model).__name__}: {error}") from error


def _guarding_one() -> AbstractContextManager[object]:
    """Makes torch.export note what is true of several samples only; else it takes that for given.

    It is PyTorch's to take away; `Captured.takes` then refuses single samples.
    """
    if not hasattr(config, ONE):
        return nullcontext()
    return config.patch({ONE: True})  # type: ignore[attr-defined]


class _Circular(TorchFunctionMode):
    """Circular padding by concatenation: PyTorch writes into parts of what it returns, which
    torch.export takes for something that needs several samples."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.pad or kwargs.get("mode") != "circular" or min(args[1]) < 0:
            return func(*args, **kwargs)
        x, sides = args
        for dim, (before, after) in enumerate(zip(sides[::2], sides[1::2], strict=True), 1):
            size = x.shape[-dim]
            ends = x.narrow(-dim, size - before, before), x.narrow(-dim, 0, after)
            x = torch.cat([ends[0], x, ends[1]], -dim)
        return x


def _export(model: nn.Module, example: Tensor, sizes: dict[int, Any] | None) -> Captured:
    with _Circular():
        program = torch.export.export(model, (example,), dynamic_shapes=sizes and (sizes,))
    program = program.run_decompositions({})
    if changed := program.graph_signature.buffers_to_mutate:
        raise CaptureError(
            f"{type(model).__name__} changes its buffers in eval mode "
            f"({', '.join(changed.values())}), and a compiled network has no state: compute "
            "without them"
        )
    module = program.module()
    assert isinstance(module, GraphModule)
    given = next(n for n in module.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
    guards: Any = getattr(module, "_guards_fn", None)
    squeezed = [n for part in _graphs(module) for n in _squeezed(part.graph)]

    def takes(x: Tensor) -> bool:
        try:
            if guards is not None:
                guards(x)
        except AssertionError:
            return False
        if isinstance(given, int):
            return len(x) == given
        if any(n.node.expr.subs(given.node.expr, len(x)) == 1 for n in squeezed):
            return False
        return len(x) > 1 or hasattr(config, ONE)

    spec = program.call_spec.out_spec
    return Captured(fuse(module), takes, lambda flat: tree_unflatten(list(flat), spec))


def _graphs(module: GraphModule) -> list[GraphModule]:
    """Of the model, and of branches in it."""
    return [part for part in module.modules() if isinstance(part, GraphModule)]


def _squeezed(graph: Graph) -> Iterator[torch.SymInt]:
    """Sizes that depend on the batch's, and were taken not to be 1."""
    for node in graph.nodes:
        if getattr(node.target, "overloadpacket", None) is aten.squeeze:
            shape = node.args[0].meta["val"].shape
            dims = node.args[1] if len(node.args) > 1 else range(len(shape))
            for dim in [dims] if isinstance(dims, int) else dims:
                if shape and not isinstance(shape[dim], int):
                    yield shape[dim]


def fuse(module: GraphModule) -> GraphModule:
    """Replace layers with constant weights, and what follows them, by `Layer`s."""
    for part in _graphs(module):
        _rewrite(part.graph)
        part.recompile()
    graph, constants = module.graph, _constants(module)
    alive, uses = set(graph.nodes), Counter[str]()
    for node in list(graph.nodes):
        if node in alive and (layer := _layer(node, constants)):
            uses[layer.name] += 1
            if uses[layer.name] > 1:  # weights that are used again, maybe at another size
                layer = replace(layer, name=f"{layer.name}@{uses[layer.name]}")
            _fuse_layer(graph, node, layer, constants)
            alive = set(graph.nodes)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _rewrite(graph: Graph) -> None:
    """Functions as they have to be where values lie in planes."""
    for node in list(graph.nodes):
        if node.op == "call_module" and node.name.startswith("_guards"):
            graph.erase_node(node)  # `Captured.takes`
        elif node.target is aten.dropout.default and not node.args[2]:
            _replace(node, node.args[0])
        elif node.op == "call_function" and node.target is aten.view.default:
            node.target = aten.reshape.default  # planes cannot always be viewed otherwise
        elif node.target in CONTIGUOUS:
            _make_contiguous(graph, node)


def attributes(module: GraphModule) -> dict[Node, Any]:
    """What the graph finds in its module: weights, buffers, and branches of torch.cond."""
    found: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(module)
            found[node] = value.detach() if isinstance(value, Tensor) else value
    return found


def _constants(module: GraphModule) -> dict[Node, Tensor]:
    """Tensors that do not depend on the input, computed."""
    known = {n: value for n, value in attributes(module).items() if isinstance(value, Tensor)}
    for node in module.graph.nodes:
        if (
            node.op == "call_function"
            and node.all_input_nodes
            and all(n in known for n in node.all_input_nodes)
            and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
            and isinstance(node.meta.get("val"), Tensor)
        ):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
            known[node] = node.target(*args, **kwargs)
    return known


def _layer(node: Node, constants: dict[Node, Tensor]) -> Layer | None:
    """The layer that a node is, unless its weights depend on the input."""
    if node.op != "call_function":
        return None
    if node.target not in (
        *(aten.max_pool2d.default, BATCH_NORM),
        *(aten.conv2d.default, aten.conv2d.padding, aten.linear.default),
    ):
        return None
    args: list[Any] = list(node.args) + [None] * 7
    x = args[0].meta["val"]
    images = x.dim() == 4
    if x.dtype != torch.float32 or not (images or node.target is aten.linear.default):
        return None
    if node.target is aten.max_pool2d.default:
        kernel, stride = _pair(args[1], 1), _pair(args[2] or args[1], 1)
        padding, dilation = _pair(args[3], 0), _pair(args[4], 1)
        if args[5]:  # sizes are rounded up
            return None
        return MaxPool.of(node.name, x.shape[1], kernel, stride, padding, dilation)
    if node.target is BATCH_NORM:
        channels = x.shape[1]
        ones = torch.ones(channels, 1, 1, 1, dtype=x.dtype, device="cpu")
        identity = Layer(node.name, ones, ones.new_zeros(channels), groups=channels)
        return _fold(node, identity, constants)
    weight, bias = constants.get(args[1]), constants.get(args[2])
    if weight is None or (bias is None and args[2] is not None) or weight.dim() < 2:
        return None
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if bias.shape != weight.shape[:1] or {weight.dtype, bias.dtype} != {torch.float32}:
        return None
    name = str(args[1].target) if args[1].op == "get_attr" else args[1].name
    if node.target is aten.linear.default:
        return Layer(name, weight, bias)
    stride, dilation = _pair(args[3], 1), _pair(args[5], 1)
    if isinstance(args[4], str):
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if args[4] == "same" and any(r % 2 for r in reach):
            return None  # more of it at one side
        padding = (reach[0] // 2, reach[1] // 2) if args[4] == "same" else (0, 0)
    else:
        padding = _pair(args[4], 0)
    return Layer(name, weight, bias, stride, padding, dilation, args[6] or 1)


def _pair(value: Any, default: int) -> tuple[int, int]:
    if value is None:
        return default, default
    values = list(value) * (2 // len(value))
    return values[0], values[1]


def _fuse_layer(graph: Graph, node: Node, layer: Layer, constants: dict[Node, Tensor]) -> None:
    """Put `layer` in place of `node` and of all that can be computed with it."""
    residual: Node | None = None
    chain = [node, *node.users] if node.target is BATCH_NORM else [node]
    while (user := _only_user(chain[-1])) is not None:
        sums = layer.combine == "fma" and residual is None
        if sums and (factor := _factor(user, chain[-1], layer, constants)) is not None:
            layer = layer.scaled(factor)
        elif sums and (folded := _fold(user, layer, constants)) is not None:
            layer = folded
            chain.append(user)
            (user,) = user.users
        elif sums and (other := _added(user, chain[-1])) is not None:
            residual = other
        else:
            if (bounds := _bounds(user)) is not None:
                layer = replace(layer, low=bounds[0], high=bounds[1])
                chain.append(user)
            break
        chain.append(user)
    with graph.inserting_before(chain[-1]):
        inputs = (node.args[0],) if residual is None else (node.args[0], residual)
        fused = graph.call_function(layer, inputs)
    fused.meta["val"] = chain[-1].meta["val"]
    chain[-1].replace_all_uses_with(fused)
    for absorbed in reversed(chain):
        graph.erase_node(absorbed)


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _fold(user: Node, layer: Layer, constants: dict[Node, Tensor]) -> Layer | None:
    """Batch normalization by its running statistics."""
    if user.target is not BATCH_NORM or layer.linear:
        return None
    if any(u.target is not operator.getitem or u.args[1] != 0 for u in user.users):
        return None  # uses the statistics
    weight, bias, mean, var = (constants.get(a) for a in user.args[1:5])  # type: ignore[arg-type]
    if mean is None or var is None or len(user.users) != 1:
        return None
    factor = (var.double() + user.args[6]).rsqrt()  # type: ignore[operator]
    if weight is not None:
        factor = factor * weight.double()
    shift = -mean.double() * factor
    return layer.scaled(factor, shift if bias is None else shift + bias.double())


def _factor(user: Node, last: Node, layer: Layer, constants: dict[Node, Tensor]) -> Tensor | None:
    """A constant for each channel by which the result is multiplied."""
    if user.target is not aten.mul.Tensor or last not in user.args:
        return None
    other = user.args[1] if user.args[0] is last else user.args[0]
    factor = constants.get(other) if isinstance(other, Node) else None
    if factor is None:
        return None
    out = layer.channels[1]
    shape = (out,) if layer.linear else (out, 1, 1)
    matches = factor.numel() == out and tuple(factor.shape[-len(shape) :]) == shape
    same = _shape(user) == _shape(last) and user.meta["val"].dtype == last.meta["val"].dtype
    return factor.reshape(-1) if matches and same else None


def _added(user: Node, last: Node) -> Node | None:
    """What is added to the result, of the same shape."""
    if user.target is not aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return None
    a, b = user.args
    if not (isinstance(a, Node) and isinstance(b, Node)) or a is b:
        return None
    other = b if a is last else a
    same = _shape(other) == _shape(last) and other.meta["val"].dtype == last.meta["val"].dtype
    return other if same else None


def _shape(node: Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _bounds(user: Node) -> tuple[float, float] | None:
    """What the result is clamped to."""
    if user.target is aten.relu.default:
        return 0.0, math.inf
    if user.target in (aten.hardtanh.default, aten.clamp.default):
        bounds = [-1.0, 1.0] if user.target is aten.hardtanh.default else [-math.inf, math.inf]
        for i, given in enumerate(user.args[1:3]):
            if isinstance(given, Node):
                return None
            if given is not None:
                bounds[i] = float(given)  # type: ignore[arg-type]
        return None if user.kwargs else (bounds[0], bounds[1])
    return None


def _make_contiguous(graph: Graph, node: Node) -> None:
    x = node.args[0]
    assert isinstance(x, Node)
    with graph.inserting_before(node):
        whole = graph.call_function(
            aten.clone.default, (x,), {"memory_format": torch.contiguous_format}
        )
    whole.meta["val"] = x.meta["val"]
    node.replace_input_with(x, whole)


def _replace(node: Node, other: Any) -> None:
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)
