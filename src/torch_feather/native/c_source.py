"""A program as C99 source: no threads, no heap, constant weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from .expressions import Expr
from .program import Buffer, Convolution, Loops, Nest, Program

LINE = 96  # characters
BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "less": "<"}


class CSource:
    """The C source of a program.

    Args:
        program: the network.

    Attributes:
        constant_bytes: size of all constants.

    Example:
        >>> "void net_run(" in CSource(Program(1).place()).text("net")
        True
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.constant_bytes = 0
        self.layers: dict[Convolution, str] = {}
        self.nests: dict[Nest, str] = {}
        for op in program.operations:
            if isinstance(op, Convolution):
                self.layers[op] = f"layer_{len(self.layers)}"
            else:
                self.nests.setdefault(op.nest, f"nest_{len(self.nests)}")
        self.constants = {b: f"constant_{i}" for i, b in enumerate(program.constants())}
        taps = [_taps(op, program.batch) for op in self.layers]
        self.taps = dict(zip(self.layers, taps, strict=True))
        self.offset_type = _smallest([n for offsets, *_ in taps for n in offsets], "int")
        self.count_type = _smallest([n for _, counts, *_ in taps for n in counts], "uint")

    def text(self, name: str) -> str:
        """Return the source file.

        Args:
            name: prefix of the function, and name of the header.
        """
        body = [
            *self._constants(),
            *(line for layer in self.layers for line in self._layer(layer)),
            *(line for nest, called in self.nests.items() for line in emit_nest(called, nest)),
            *self._run(name),
        ]
        lines = [f'#include "{name}.h"', "", "#include <math.h>", ""]
        used = {e.op for nest in self.nests for e in nest.expression.walk()}
        for op, helper in HELPERS.items():
            if used & {op, f"fold_{op}"}:
                lines += [helper, ""]
        if self.layers:
            types = {"OFFSET": self.offset_type, "COUNT": self.count_type}
            source = LAYER
            for key, value in types.items():
                source = source.replace(key, value)
            lines += [source, ""]
        return "\n".join([*lines, *body]) + "\n"

    def signature(self, name: str) -> str:
        """Return the declaration of the function that computes the network."""
        inputs = "".join(f", const float *input_{i}" for i in range(len(self.program.inputs)))
        outputs = "".join(f", float *output_{i}" for i in range(len(self.program.outputs)))
        return f"void {name}_run(float *workspace{inputs}{outputs})"

    def _constants(self) -> Iterator[str]:
        for buffer, name in self.constants.items():
            assert buffer.data is not None
            yield from self._array("float", name, buffer.data)

    def _array(self, kind: str, name: str, values: np.ndarray) -> Iterator[str]:
        """Yield the definition of a constant array, and count its bytes."""
        bits = 32 if kind == "float" else int("".join(c for c in kind if c.isdigit()))
        self.constant_bytes += len(values) * bits // 8
        yield from constant_array(kind, name, values)

    def _layer(self, operation: Convolution) -> Iterator[str]:
        step, name = operation.step, self.layers[operation]
        layout, layer = step.out.layout.root(), step.layer
        offsets, counts, weights, bias = self.taps[operation]
        yield f"/* {layer.name}: {len(offsets)} of {layer.weight.numel()} weights */"
        yield from self._array(self.offset_type, f"{name}_offsets", offsets)
        yield from self._array(self.count_type, f"{name}_counts", counts)
        yield from self._array("float", f"{name}_bias", bias)
        largest = layer.combine == "max"
        if not largest:
            yield from self._array("float", f"{name}_weights", weights)
        values = {
            "weights": "0" if largest else f"{name}_weights",
            "bias": f"{name}_bias",
            "offsets": f"{name}_offsets",
            "counts": f"{name}_counts",
            "low": _number(layer.low),
            "high": _number(layer.high),
            "channels": step.out.channels,
            "plane": layout.channel_stride(self.program.batch),
            "edge": layout.edge,
            "images": self.program.batch,
            "rows": layout.image_stride // layout.row_stride,
            "pitch": layout.row_stride,
            "height": step.out.height,
            "width": step.out.width,
        }
        fields = ", ".join(str(v) for v in values.values())
        yield f"static const layer {name} = {{{fields}}};"
        yield ""

    def _run(self, name: str) -> Iterator[str]:
        yield self.signature(name)
        yield "{"
        if not self.program.workspace:
            yield "    (void)workspace;"
        for op in self.program.operations:
            if isinstance(op, Convolution):
                residual = "0" if op.residual is None else self._place(op.residual, 0)
                places = f"{self._place(op.out, 0)}, {self._place(op.x, 0)}, {residual}"
                yield f"    run_layer(&{self.layers[op]}, {places});"
            elif isinstance(op, Loops):
                given = ", ".join(self._place(*at) for at in (op.out, *op.operands))
                yield f"    {self.nests[op.nest]}({given});"
        yield "}"

    def _place(self, buffer: Buffer, offset: int) -> str:
        if buffer.kind == "constant":
            base = self.constants[buffer]
        elif buffer.kind == "work":
            base, offset = "workspace", offset + buffer.offset
        else:
            base = f"{buffer.kind}_{buffer.index}"
        return f"{base} + {offset}" if offset else base


def constant_array(kind: str, name: str, values: np.ndarray) -> Iterator[str]:
    """Yield the lines of the definition of a constant array.

    Args:
        kind: type of the elements.
        name: name of the array.
        values: (n,).

    Example:
        >>> next(constant_array("float", "bias", np.ones(3)))
        'static const float bias[3] = {'
    """
    items = [_number(float(v)) if kind == "float" else str(int(v)) for v in values] or ["0"]
    yield f"static const {kind} {name}[{len(items)}] = {{"
    line = "   "
    for item in items:
        if len(line) + len(item) + 2 > LINE:
            yield line
            line = "   "
        line += f" {item},"
    yield line
    yield "};"
    yield ""


def emit_nest(name: str, nest: Nest) -> Iterator[str]:
    """Yield the lines of the C function of a loop nest.

    Example:
        >>> from .expressions import operand
        >>> next(emit_nest("copy", Nest((4,), (), operand(0), (1,), ((1,),))))
        'static void copy(float *out, const float *x0)'
    """
    operands = "".join(f", const float *x{k}" for k in range(len(nest.operands)))
    yield f"static void {name}(float *out{operands})"
    yield "{"
    indent = "    "
    for d, size in enumerate(nest.sizes):
        yield f"{indent}for (int32_t i{d} = 0; i{d} < {size}; i{d}++) {{"
        indent += "    "
    folds = [e for e in nest.expression.walk() if e.op.startswith("fold_")]
    for fold in folds:
        yield f"{indent}float sum = {_number(fold.value)};"
        inside = indent
        for d, size in enumerate(nest.reduced):
            yield f"{inside}for (int32_t r{d} = 0; r{d} < {size}; r{d}++)"
            inside += "    "
        term = _expression(fold.args[0], nest, reduced=True)
        yield (
            f"{inside}sum += {term};" if fold.op == "fold_add" else
            f"{inside}sum = max_of(sum, {term});"
        )  # fmt: skip
    at = _index(nest.out, len(nest.sizes))
    yield f"{indent}out[{at}] = {_expression(nest.expression, nest, reduced=False)};"
    for _ in nest.sizes:
        indent = indent[4:]
        yield f"{indent}}}"
    yield "}"
    yield ""


def _expression(e: Expr, nest: Nest, reduced: bool) -> str:
    if e.op == "constant":
        return _number(e.value)
    if e.op == "operand":
        k = int(e.value)
        strides = nest.operands[k] if reduced else nest.operands[k][: len(nest.sizes)]
        return f"x{k}[{_index(strides, len(nest.sizes))}]"
    if e.op.startswith("fold_"):
        return "sum"
    args = [_expression(a, nest, reduced) for a in e.args]
    if e.op in BINARY:
        return f"({args[0]} {BINARY[e.op]} {args[1]})"
    if e.op == "select":
        return f"({args[0]} != 0 ? {args[1]} : {args[2]})"
    function = f"{e.op}_of" if e.op in HELPERS else f"{e.op}f"
    return f"{function}({', '.join(args)})"


def _index(strides: Sequence[int], outer: int) -> str:
    names = [f"i{d}" if d < outer else f"r{d - outer}" for d in range(len(strides))]
    terms = [n if s == 1 else f"{n} * {s}" for n, s in zip(names, strides, strict=True) if s]
    return " + ".join(terms) or "0"


def _number(value: float) -> str:
    """Return a float32 constant; nine digits identify it."""
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    if math.isnan(value):
        return "NAN"
    text = f"{np.float32(value):.9g}"
    if "." not in text and "e" not in text:
        text += "."
    return f"{text}f"


def _taps(
    operation: Convolution, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the offsets of the taps, their number in each channel, weights and biases."""
    step = operation.step
    grouped = step.taps.grouped(1)
    table = grouped.table(step.x, batch)
    return table[:, 0], np.diff(grouped.rows), grouped.values[:, 0], step.layer.bias.numpy()


def _smallest(values: Sequence[int], kind: str) -> str:
    """Return the smallest type of C that holds all values."""
    low, high = min(values, default=0), max(values, default=0)
    for bits in (8, 16):
        limits = np.iinfo(f"{kind}{bits}")
        if limits.min <= low and high <= limits.max:
            return f"{kind}{bits}_t"
    return f"{kind}32_t"


# NaN stays NaN, as in PyTorch.
HELPERS = {
    "max": "static float max_of(float a, float b) { return a > b || a != a ? a : b; }",
    "min": "static float min_of(float a, float b) { return a < b || a != a ? a : b; }",
}

LAYER = """\
/* A sparse layer. Activations are planes: one per channel, with zeros around each image. */
typedef struct {
    const float *weights; /* 0: max pooling */
    const float *bias;
    const OFFSET *offsets; /* from an output pixel to the input pixel of each weight */
    const COUNT *counts;   /* weights of each output channel */
    float low, high;       /* bounds of the result */
    int32_t channels, plane, edge, images, rows, pitch, height, width;
} layer;

#define TILE 16 /* pixels that are computed together; divides each plane */

/* Set the pixels of a plane between and behind the images to 0. */
static void clear_padding(const layer *l, float *plane)
{
    int32_t at = 0;
    for (int32_t row = 0; row < l->images * l->rows; row++, at += l->pitch)
        for (int32_t x = row % l->rows < l->height ? l->width : 0; x < l->pitch; x++)
            plane[at + x] = 0;
    for (; at < l->plane; at++)
        plane[at] = 0;
}

static void run_layer(const layer *l, float *out, const float *x, const float *residual)
{
    const float *weights = l->weights;
    const OFFSET *offsets = l->offsets;
    float *y = out + l->edge;
    for (int32_t i = 0; i < l->edge; i++)
        out[i] = y[l->channels * l->plane + i] = 0;
    x += l->edge;
    for (int32_t c = 0; c < l->channels; c++, y += l->plane) {
        int32_t count = (int32_t)l->counts[c];
        for (int32_t p = 0; p < l->plane; p += TILE) {
            float sum[TILE];
            for (int32_t i = 0; i < TILE; i++)
                sum[i] = l->bias[c];
            for (int32_t k = 0; k < count; k++) {
                const float *pixels = x + p + offsets[k];
                if (weights)
                    for (int32_t i = 0; i < TILE; i++)
                        sum[i] += weights[k] * pixels[i];
                else
                    for (int32_t i = 0; i < TILE; i++)
                        sum[i] = pixels[i] > sum[i] || pixels[i] != pixels[i] ? pixels[i] : sum[i];
            }
            for (int32_t i = 0; i < TILE; i++) {
                float v = sum[i] + (residual ? residual[l->edge + c * l->plane + p + i] : 0);
                v = v < l->low ? l->low : v;
                y[p + i] = v > l->high ? l->high : v;
            }
        }
        offsets += count;
        weights = weights ? weights + count : 0;
        clear_padding(l, y);
    }
}"""
