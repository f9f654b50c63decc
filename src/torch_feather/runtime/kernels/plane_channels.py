"""LLVM IR of the kernels that combine all channels of each pixel.

    layer_norm   out[c, p] = (x[c, p] - mean) / deviation · weight[c] + bias[c]
    softmax      out[c, p] = exp(x[c, p] - maximum) / sum of these numbers
    log_softmax  out[c, p] = x[c, p] - maximum - log(sum of exp(x[c, p] - maximum))

The items are vectors of pixels. Sums and maxima stay in registers, as LLVM promotes `%total`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from .activations import VectorCode
from .text import VectorText


def choose_mask(code: VectorText, other: str) -> None:
    """Without a mask, read another address instead; the value is not used.

    Args:
        code: of a function that has loaded its record.
        other: the other address.

    Example:
        >>> code = VectorText(8)
        >>> choose_mask(code, "%x")
        >>> code.lines[0]
        '  %is.whole = icmp eq ptr %mask, null'
    """
    code("%is.whole = icmp eq ptr %mask, null")
    code(f"%mask.safe = select i1 %is.whole, ptr {other}, ptr %mask")


def masked_vector(code: VectorText, value: str, pixel: str) -> str:
    """Set the pixels between images to 0, if there are any. Return the name of the result.

    Args:
        code: after `choose_mask`.
        value: a vector of pixels.
        pixel: number of the first one.

    Example:
        >>> masked_vector(VectorText(8), "%value", "%p")
        '%masked'
    """
    v, iv = code.vector, f"<{code.width} x i32>"
    code(f"%mask.at = getelementptr i32, ptr %mask.safe, i64 {pixel}")
    code(f"%mask.here = load {iv}, ptr %mask.at, align 4")
    ones = f"<{', '.join(['i32 -1'] * code.width)}>"
    code(f"%mask.used = select i1 %is.whole, {iv} {ones}, {iv} %mask.here")
    code(f"%bits = bitcast {v} {value} to {iv}")
    code(f"%bits.masked = and {iv} %bits, %mask.used")
    code(f"%masked = bitcast {iv} %bits.masked to {v}")
    return "%masked"


def _begin(code: VectorText) -> None:
    """Find the first pixel of the vector."""
    code(f"%p = mul i64 %i, {code.width}")
    code.at("row", "%x", "%p")
    code.at("to", "%out", "%p")
    choose_mask(code, "%row")


def _pixels(code: VectorText, c: str) -> str:
    """Load the pixels of channel c. Return the name of the vector."""
    code(f"%{c}.first = mul i64 %{c}, %x_plane")
    return code.load(f"{c}.x", code.at(f"{c}.at", "%row", f"%{c}.first"))


def _place(code: VectorText, c: str) -> str:
    """Return the address of the pixels of channel c of the result."""
    code(f"%{c}.to = mul i64 %{c}, %plane")
    return code.at(f"{c}.to.at", "%to", f"%{c}.to")


def _total(code: VectorText, c: str) -> str:
    """Load the sum, or maximum, so far. Return its name."""
    return code.load(f"{c}.before", "%total")


def _fused(code: VectorText, name: str, *factors: str) -> str:
    """Append a · b + c, and return its name."""
    v = code.vector
    arguments = ", ".join(f"{v} {factor}" for factor in factors)
    code(f"%{name} = call {v} @llvm.fmuladd.v{code.width}f32({arguments})")
    return f"%{name}"


def _layer_norm(code: VectorText) -> None:
    v = code.vector
    _begin(code)
    factor, eps = code.splat("factor.all", "%factor"), code.splat("eps.all", "%eps")
    code.store("zeroinitializer", "%total")
    with code.loop("%a", "0", "%channels"):
        x = _pixels(code, "a")
        code(f"%a.after = fadd {v} {_total(code, 'a')}, {x}")
        code.store("%a.after", "%total")
    code(f"%mean = fmul {v} {code.load('sum', '%total')}, {factor}")
    code.store("zeroinitializer", "%total")
    with code.loop("%b", "0", "%channels"):
        code(f"%b.centered = fsub {v} {_pixels(code, 'b')}, %mean")
        before = _total(code, "b")
        code.store(_fused(code, "b.after", "%b.centered", "%b.centered", before), "%total")
    variance = _fused(code, "variance", code.load("squares", "%total"), factor, eps)
    code(f"%deviation = call {v} @llvm.sqrt.v{code.width}f32({v} {variance})")
    code(f"%inverse = fdiv {v} {code.splat('one', '1.0')}, %deviation")
    with code.loop("%c", "0", "%channels"):
        code(f"%c.centered = fsub {v} {_pixels(code, 'c')}, %mean")
        for name in ("weight", "bias"):
            at = code.at(f"{name}.at", f"%{name}", "%c")
            code(f"%{name}.here = load float, ptr {at}")
            code.splat(f"{name}.all", f"%{name}.here")
        code(f"%c.scale = fmul {v} %inverse, %weight.all")
        value = _fused(code, "c.y", "%c.centered", "%c.scale", "%bias.all")
        code.store(masked_vector(code, value, "%p"), _place(code, "c"))


def _softmax(code: VectorText, log: bool = False) -> None:
    v, vector = code.vector, VectorCode(code.width)

    def append(name: str) -> str:
        """Append what `vector` computed, and return the name of the result."""
        code.lines += vector.lines
        vector.lines.clear()
        return name

    _begin(code)
    code.store(vector.constant(-math.inf), "%total")
    with code.loop("%a", "0", "%channels"):
        x = _pixels(code, "a")
        before = _total(code, "a")
        code.store(append(vector.choose("ogt", x, before, x, before)), "%total")
    high = code.load("high", "%total")
    code.store("zeroinitializer", "%total")
    with code.loop("%b", "0", "%channels"):
        code(f"%b.less = fsub {v} {_pixels(code, 'b')}, {high}")
        power = append(vector.exp_of_negative("%b.less"))
        if not log:
            code.store(power, _place(code, "b"))
        code(f"%b.after = fadd {v} {_total(code, 'b')}, {power}")
        code.store("%b.after", "%total")
    total = code.load("sum", "%total")
    if log:
        shift = append(vector.log(total))
    else:
        code(f"%inverse = fdiv {v} {vector.constant(1.0)}, {total}")
    with code.loop("%c", "0", "%channels"):
        to = _place(code, "c")
        if log:
            code(f"%c.less = fsub {v} {_pixels(code, 'c')}, {high}")
            code(f"%c.y = fsub {v} %c.less, {shift}")
        else:
            code(f"%c.y = fmul {v} {code.load('c.power', to)}, %inverse")
        code.store(masked_vector(code, "%c.y", "%p"), to)


# Writers of the kernels, by name; the functions have a vector `%total` in memory.
OVER_CHANNELS: dict[str, Callable[[VectorText], None]] = {
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "log_softmax": partial(_softmax, log=True),
}
