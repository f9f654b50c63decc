"""A network as a program: buffers of float32 numbers, and operations on them in order.

The program is independent of the target. `llvm_ir` writes it as LLVM IR, `c_source` as C99.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ..runtime.memory import round_up
from ..runtime.plan import Sparse
from .expressions import Expr


@dataclass(eq=False)
class Buffer:
    """Memory of float32 numbers.

    Attributes:
        kind: "work" (activations), "constant", "input" or "output".
        size: float32 numbers.
        data: numbers of a constant.
        index: number of the input or output.
        offset: first number in the workspace, or in the constants; `place` sets it.

    Example:
        >>> Buffer("work", 16).offset
        0
    """

    kind: str
    size: int
    data: np.ndarray | None = None
    index: int = 0
    offset: int = 0


@dataclass(frozen=True)
class View:
    """A tensor in a buffer.

    Attributes:
        buffer: its memory.
        shape: sizes.
        strides: in float32 numbers.
        offset: first number in the buffer.

    Example:
        >>> View.contiguous(Buffer("work", 6), (2, 3)).strides
        (3, 1)
    """

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @classmethod
    def contiguous(cls, buffer: Buffer, shape: tuple[int, ...]) -> View:
        """Return a contiguous tensor at the start of a buffer."""
        return cls(buffer, shape, contiguous_strides(shape))


@dataclass(frozen=True)
class Nest:
    """A loop nest: computes an expression for each index, and for each reduced index inside it.

    Attributes:
        sizes: of the result.
        reduced: sizes of the reduced indices.
        expression: of one element.
        out: strides of the result, one per index.
        operands: strides of each operand, one per index and per reduced index.

    Example:
        >>> from .expressions import operand
        >>> Nest((2, 3), (), operand(0), (3, 1), ((3, 1),)).merged().sizes
        (6,)
    """

    sizes: tuple[int, ...]
    reduced: tuple[int, ...]
    expression: Expr
    out: tuple[int, ...]
    operands: tuple[tuple[int, ...], ...]

    def merged(self) -> Nest:
        """Return the same nest with as few loops as possible."""
        n = len(self.sizes)
        rows = [self.out, *(o[:n] for o in self.operands)]
        sizes, rows = _merge(self.sizes, rows)
        reduced, inner = _merge(self.reduced, [o[n:] for o in self.operands])
        operands = tuple(a + b for a, b in zip(rows[1:], inner, strict=True))
        return Nest(sizes, reduced, self.expression, rows[0], operands)


@dataclass(eq=False)
class Loops:
    """An operation: a loop nest on memory.

    Attributes:
        nest: the loops.
        out: buffer and first number of the result.
        operands: buffers and first numbers.

    Example:
        >>> from .expressions import expr
        >>> fill = Nest((16,), (), expr(0.0), (1,), ())
        >>> len(Loops(fill, (Buffer("work", 16), 0), ()).writes)
        1
    """

    nest: Nest
    out: tuple[Buffer, int]
    operands: tuple[tuple[Buffer, int], ...]

    @property
    def reads(self) -> list[Buffer]:
        """Buffers that it reads."""
        return [buffer for buffer, _ in self.operands]

    @property
    def writes(self) -> list[Buffer]:
        """Buffers that it writes."""
        return [self.out[0]]


@dataclass(eq=False)
class Convolution:
    """An operation: a sparse layer, from planes to planes.

    Attributes:
        step: the layer, its taps, and the layout of its planes.
        x: buffer of the input planes.
        out: buffer of the result.
        residual: buffer of the planes that are added.

    Example:
        >>> from ..runtime.plan import Plan
        >>> Convolution.__name__
        'Convolution'
    """

    step: Sparse
    x: Buffer
    out: Buffer
    residual: Buffer | None = None

    @property
    def reads(self) -> list[Buffer]:
        """Buffers that it reads."""
        return [b for b in (self.x, self.residual) if b is not None]

    @property
    def writes(self) -> list[Buffer]:
        """Buffers that it writes."""
        return [self.out]


Operation = Loops | Convolution


@dataclass
class Program:
    """A network for one batch size.

    Attributes:
        batch: number of samples.
        inputs: input tensors, contiguous.
        outputs: output tensors, contiguous.
        operations: in order.
        workspace: float32 numbers of all activations; `place` sets it.

    Example:
        >>> Program(1).place().workspace
        0
    """

    batch: int
    inputs: list[View] = field(default_factory=list)
    outputs: list[View] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    workspace: int = 0

    def constants(self) -> list[Buffer]:
        """Return the constant buffers in the order of their first use."""
        used = (b for op in self.operations for b in op.reads if b.kind == "constant")
        return list(dict.fromkeys(used))

    def place(self) -> Program:
        """Assign memory: activations that are in use at the same time do not overlap.

        The largest are placed first, each at the lowest free address.
        """
        first: dict[Buffer, int] = {}
        last: dict[Buffer, int] = {}
        for i, operation in enumerate(self.operations):
            for buffer in (*operation.reads, *operation.writes):
                if buffer.kind == "work":
                    first.setdefault(buffer, i)
                    last[buffer] = i
        placed: list[Buffer] = []
        for buffer in sorted(first, key=lambda b: (-b.size, first[b])):
            alive = [b for b in placed if first[b] <= last[buffer] and first[buffer] <= last[b]]
            buffer.offset = _lowest_free(alive, buffer.size)
            placed.append(buffer)
        self.workspace = max((b.offset + round_up(b.size) for b in placed), default=0)
        return self


def contiguous_strides(shape: Iterable[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor.

    Example:
        >>> contiguous_strides((2, 3, 4))
        (12, 4, 1)
    """
    shape = tuple(shape)
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _lowest_free(taken: list[Buffer], size: int) -> int:
    start = 0
    for other in sorted(taken, key=lambda b: b.offset):
        if other.offset - start >= round_up(size):
            break
        start = max(start, other.offset + round_up(other.size))
    return start


def _merge(
    sizes: tuple[int, ...], rows: list[tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Merge neighboring loops whose strides continue each other; drop loops of one iteration."""
    found: list[tuple[int, list[int]]] = []
    for size, *strides in zip(sizes, *rows, strict=True):
        if size == 1:
            continue
        if found and all(a == b * size for a, b in zip(found[-1][1], strides, strict=True)):
            found[-1] = found[-1][0] * size, strides
        else:
            found.append((size, strides))
    merged = tuple(size for size, _ in found)
    return merged, [tuple(strides[k] for _, strides in found) for k in range(len(rows))]
