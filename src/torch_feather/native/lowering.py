"""Lowering: from the plan of a captured network to a program of loop nests and sparse layers."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..runtime.constants import attributes
from ..runtime.layer import Layer
from ..runtime.plan import Copy, Operation, Plan, Pointwise, Sparse, Torch, can_run_sparse
from ..runtime.planes import Planes
from .errors import NativeExportError
from .expressions import Expr, clamp, expr, operand, total
from .products import ROWS
from .program import Buffer, Convolution, Loops, Nest, Program, View

aten = torch.ops.aten


def lower(
    module: GraphModule, supported: dict[Any, Callable[..., Any]], tiles: bool = True
) -> Program:
    """Return the program of a network.

    Args:
        module: captured for one batch size, with fused layers.
        supported: functions that add an operation of PyTorch to a program, see `operations`.
        tiles: see `Builder`.

    Raises:
        NativeExportError: the network has an operation that is not supported.

    Example:
        >>> from ..runtime.capture import capture
        >>> from .operations import SUPPORTED
        >>> captured = capture(torch.nn.Linear(8, 4), torch.ones(1, 8), any_batch=False)
        >>> [type(op).__name__ for op in lower(captured.module, SUPPORTED).operations]
        ['Loops', 'Loops', 'Convolution', 'Loops']
    """
    graph = module.graph
    given = next(n for n in graph.nodes if n.op == "placeholder").meta["val"]
    layers = [
        n.target
        for n in graph.nodes
        if isinstance(n.target, Layer) and can_run_sparse(n, given.shape[0])
    ]
    return _Lowering(module, Plan.build(graph, layers), supported, tiles).program.place()


class Builder:
    """Adds operations to a program.

    Attributes:
        program: the program so far.
        tiles: whether products of matrices are computed in tiles, which read adjacent columns of
            the second factor, see `products`. Otherwise each number is the sum of a loop, which
            reads a column.

    Example:
        >>> builder = Builder(Program(batch=1))
        >>> builder.compute(operand(0) + 1.0, View.contiguous(Buffer("work", 6), (2, 3))).shape
        (2, 3)
    """

    def __init__(self, program: Program, tiles: bool = True) -> None:
        self.program, self.tiles = program, tiles
        self._constants: dict[int, tuple[Tensor, View]] = {}

    def constant(self, value: Tensor) -> View:
        """Return a tensor as a constant; the same for the same tensor."""
        if id(value) not in self._constants:
            data = value.detach().to(torch.float32).contiguous().numpy().reshape(-1)
            buffer = Buffer("constant", data.size, data)
            self._constants[id(value)] = value, View.contiguous(buffer, tuple(value.shape))
        return self._constants[id(value)][1]

    def transposed(self, weight: Tensor, rows: int) -> View:
        """Return a constant weight (out, in) as the second factor of a product, (in, out).

        Its columns are adjacent in memory if tiles read them. Otherwise, and for too few rows for a
        tile, the numbers of a column are adjacent: reads at large equal distances are slow.

        Args:
            weight: (out, in).
            rows: of the first factor.
        """
        if self.tiles and rows >= ROWS:
            return self.constant(weight.t())
        return transform(self.constant(weight), lambda t: t.t())

    def view(self, value: Any) -> View:
        """Return a value as a view; constants of the model become constants of the program."""
        if isinstance(value, Tensor):
            return self.constant(value)
        if not isinstance(value, View):
            raise NativeExportError(f"a tensor is required, got {type(value).__name__}")
        return value

    def empty(self, shape: tuple[int, ...]) -> View:
        """Return a new tensor without values."""
        return View.contiguous(Buffer("work", math.prod(shape)), shape)

    def compute(
        self, expression: Expr, *operands: Any, reduced: int = 0, out: View | None = None
    ) -> View:
        """Add a loop nest over the broadcast operands.

        Args:
            expression: of one element.
            operands: tensors; their shapes are broadcast.
            reduced: number of last dimensions that are reduced.
            out: where to write. [default: a new tensor]
        """
        views = [self.view(x) for x in operands]
        shape = torch.broadcast_shapes(*(v.shape for v in views)) if views else ()
        if out is not None and not reduced:
            shape = out.shape
        split = len(shape) - reduced
        sizes, inner = tuple(shape[:split]), tuple(shape[split:])
        out = self.empty(sizes) if out is None else out
        wide = [transform(v, lambda t: t.expand(shape)) for v in views]
        nest = Nest(sizes, inner, expression, out.strides, tuple(v.strides for v in wide))
        if math.prod(shape):
            places = tuple((v.buffer, v.offset) for v in wide)
            self.program.operations.append(Loops(nest.merged(), (out.buffer, out.offset), places))
        return out

    def copy(self, value: Any, out: View | None = None) -> View:
        """Add a copy of a tensor, contiguous by default."""
        return self.compute(operand(0), value, out=out)

    def fill(self, out: View, value: float) -> None:
        """Set all elements of a tensor."""
        self.compute(expr(value), out=out)

    def reshape(self, value: Any, shape: Any) -> View:
        """Return a tensor with another shape, copied if its strides do not allow a view."""
        view = self.view(value)
        try:
            return transform(view, lambda t: t.view(shape))
        except RuntimeError:
            return transform(self.copy(view), lambda t: t.view(shape))


def transform(view: View, function: Callable[[Tensor], Tensor]) -> View:
    """Return what a function of PyTorch that returns views makes of a view.

    Example:
        >>> transform(View.contiguous(Buffer("work", 6), (2, 3)), lambda t: t.T).strides
        (1, 3)
    """
    return _view_of(view.buffer, function(_meta(view)))


def _meta(view: View) -> Tensor:
    """Return a tensor without values that has the strides of a view."""
    memory = torch.empty(view.buffer.size, device="meta")
    return memory.as_strided(view.shape, view.strides, view.offset)


def _view_of(buffer: Buffer, x: Tensor) -> View:
    return View(buffer, tuple(x.shape), tuple(x.stride()), int(x.storage_offset()))


class _Lowering:
    """Lowers the steps of one plan."""

    def __init__(
        self, module: GraphModule, plan: Plan, supported: dict[Any, Any], tiles: bool
    ) -> None:
        self.plan, self.supported = plan, supported
        graph = module.graph
        self.values: dict[Node, Any] = dict(attributes(module))
        given = next(n for n in graph.nodes if n.op == "placeholder")
        shape = tuple(given.meta["val"].shape)
        self.program = Program(batch=shape[0])
        self.builder = Builder(self.program, tiles)
        self.memory: dict[Planes, Buffer] = {}
        self.values[given] = View.contiguous(Buffer("input", math.prod(shape)), shape)
        self.program.inputs.append(self.values[given])
        for node, planes in plan.planes.items():
            self.values[node] = self._image(planes)
        for step in plan.steps:
            if isinstance(step, Torch):
                self.values[step.node] = self._torch(step.node)
            elif isinstance(step, Copy):
                self._copy(step)
            elif isinstance(step, Sparse):
                self._sparse(step)
            elif isinstance(step, Operation):
                self._interleave(step)
            elif isinstance(step, Pointwise):
                self._pointwise(step)
        self._outputs(next(n for n in graph.nodes if n.op == "output").args[0])

    def _outputs(self, found: Any) -> None:
        nodes: list[Any] = []
        map_arg(found, nodes.append)
        for i, node in enumerate(nodes):
            value = self.builder.view(self.values[node])
            buffer = Buffer("output", math.prod(value.shape), index=i)
            out = View.contiguous(buffer, value.shape)
            self.builder.copy(value, out)
            self.program.outputs.append(out)

    def _buffer(self, planes: Planes) -> Buffer:
        if planes not in self.memory:
            self.memory[planes] = Buffer("work", planes.size(self.program.batch))
        return self.memory[planes]

    def _image(self, planes: Planes) -> View:
        """Return planes as a tensor of the shape that PyTorch has."""
        buffer = self._buffer(planes)
        memory = torch.empty(buffer.size, device="meta")
        return _view_of(buffer, planes.view(memory, self.program.batch))

    def _sparse(self, step: Sparse) -> None:
        residual = None if step.residual is None else self._buffer(step.residual)
        x, out = self._buffer(step.x), self._buffer(step.out)
        self.program.operations.append(Convolution(step, x, out, residual))

    def _interleave(self, step: Operation) -> None:
        """Move the pixels of a transposed convolution to their places, and clear the padding."""
        builder, buffer, (b, a) = self.builder, self._buffer(step.out), step.stride
        assert step.name == "interleave"
        builder.fill(View.contiguous(buffer, (buffer.size,)), 0.0)
        x, out = self._image(step.x[0]), self._image(step.out)
        for i, j in itertools.product(range(b), range(a)):
            to = transform(out, lambda t, i=i, j=j: t[:, :, i::b, j::a])  # type: ignore[misc]
            phase, (rows, columns) = i * a + j, to.shape[2:]
            builder.copy(
                transform(x, lambda t, p=phase, h=rows, w=columns: t[:, p :: a * b, :h, :w]),  # type: ignore[misc]
                to,
            )

    def _pointwise(self, step: Pointwise) -> None:
        """Compute all memory of the planes, including the padding, which stays 0."""
        views = {
            node: View.contiguous(self._buffer(x), (self._buffer(x).size,))
            for node, x in zip(step.node.all_input_nodes, step.x, strict=True)
        }
        out = self._buffer(step.out)
        args, kwargs = map_arg((step.node.args, step.node.kwargs), views.__getitem__)  # type: ignore[arg-type]
        function = self._function(step.node)
        result = function(self.builder, *args, **kwargs)
        # Write into the planes of the plan, instead of the new tensor.
        last = self.program.operations[-1]
        assert isinstance(last, Loops)
        assert last.out[0] is result.buffer
        last.out = out, 0

    def _copy(self, step: Copy) -> None:
        builder, batch, layout = self.builder, self.program.batch, step.out.layout.root()
        source, (height, width), (sy, sx) = self.values[step.source], step.size, step.stride
        source = builder.view(source)
        if len(source.shape) == 5:  # slices of volumes are channels
            source = builder.reshape(source, (batch, -1, height, width))
        channels = step.out.channels // len(step.phases)
        if step.out.linear:
            rows = builder.reshape(source, (batch, width, channels))
            source = transform(rows, lambda t: t.permute(0, 2, 1).unsqueeze(2))
        buffer, plane = self._buffer(step.out), layout.channel_stride(batch)
        builder.fill(View.contiguous(buffer, (buffer.size,)), step.padding_value)
        strides = (layout.image_stride, plane, layout.row_stride, 1)
        every = tuple(itertools.product(range(sy), range(sx)))
        if step.phases == every and height % sy == 0 and width % sx == 0:  # one loop nest for all
            split = transform(
                source,
                lambda t: t.unflatten(3, (-1, sx)).unflatten(2, (-1, sy)).permute(3, 5, 0, 1, 2, 4),
            )
            phase = channels * plane
            grid = View(buffer, split.shape, (sx * phase, phase, *strides), layout.edge)
            builder.copy(split, grid)
            return
        for i, (a, b) in enumerate(step.phases):
            part = transform(source, lambda t, a=a, b=b: t[:, :, a::sy, b::sx])  # type: ignore[misc]
            start = layout.edge + i * channels * plane
            builder.copy(part, View(buffer, part.shape, strides, start))

    def _torch(self, node: Node) -> Any:
        known = [self.values[n] for n in node.all_input_nodes]
        args: Any
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.values[n])
        target: Any = node.target
        if isinstance(target, Layer):
            return self._dense(target, *args)
        if target is operator.getitem:
            return args[0][args[1]]
        if all(isinstance(value, Tensor) for value in known):
            return target(*args, **kwargs)  # does not depend on the input
        if getattr(target, "is_view", False) and target not in self.supported:
            return self._views(target, args, kwargs)
        function = self._function(node)
        try:
            return function(self.builder, *args, **kwargs)
        except (NativeExportError, TypeError) as error:
            raise NativeExportError(
                f"Native libraries do not support this call of {name_of(node)} (node {node.name}): "
                f"{error}. Use another layer, or export with --format onnx."
            ) from error

    def _function(self, node: Node) -> Callable[..., Any]:
        if node.target not in self.supported:
            raise NativeExportError(
                f"Native libraries do not support {name_of(node)} (node {node.name}). Use another "
                "layer, or export with --format onnx."
            )
        return self.supported[node.target]

    def _views(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return views of a value: slices, permutations, splits."""
        view = self.builder.view(args[0])
        given = _meta(view)
        found = target(given, *args[1:], **kwargs)
        for x in [found] if isinstance(found, Tensor) else found:
            if x.untyped_storage()._cdata != given.untyped_storage()._cdata:
                raise NativeExportError(f"{target} copies a tensor of strides {view.strides}.")
        if isinstance(found, Tensor):
            return _view_of(view.buffer, found)
        return [_view_of(view.buffer, x) for x in found]

    def _dense(self, layer: Layer, x: Any, residual: Any = None) -> View:
        """Add a linear layer that has no planes, since its samples are not the first dimension."""
        builder = self.builder
        if not layer.linear:
            raise NativeExportError(
                f"{layer.name}: the samples of a batch must be the first dimension of its input. "
                "Export with --format onnx."
            )
        x = builder.view(x)
        rows = transform(x, lambda t: t.unsqueeze(-2))
        result = total(operand(0) * operand(1)) + operand(2)
        more = []
        if residual is not None:
            result = result + operand(3)
            more = [transform(builder.view(residual), lambda t: t.unsqueeze(-1))]
        low, high = (None if math.isinf(b) else b for b in (layer.low, layer.high))
        bias = transform(builder.constant(layer.bias), lambda t: t.unsqueeze(-1))
        result = clamp(result, low, high)
        factor = builder.transposed(layer.folded_weight(), math.prod(x.shape[:-1]))
        columns = transform(factor, lambda t: t.t())
        return builder.compute(result, rows, columns, bias, *more, reduced=1)


def name_of(node: Node) -> str:
    """Return the name of a node's operation.

    Example:
        >>> from torch.fx import Graph
        >>> name_of(Graph().call_function(aten.relu.default))
        'relu.default'
    """
    return str(node.target).removeprefix("aten.")
