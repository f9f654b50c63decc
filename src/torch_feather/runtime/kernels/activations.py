"""LLVM IR of activation functions, which layers and other kernels call.

A function reads a row of vectors and writes another one. So its constants stay in registers, and
the processor computes several vectors at once. The exponential function is computed as 2^n · e^r
with |r| ≤ ln(2)/2 and a polynomial for e^r. The errors are below 1e-6 of the result, except where
it is so small that PyTorch's own are larger, and on processors without fused multiply-adds: there
they grow with |x|, to 5e-6 of e^x at |x| = 87.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

from .text import FunctionText

# The activation functions; those of `ZERO_AT_ZERO` map 0 to 0, so that padding stays 0.
ZERO_AT_ZERO = ("silu", "gelu", "gelu_tanh", "hardswish", "tanh")
ACTIVATIONS = (*ZERO_AT_ZERO, "sigmoid", "hardsigmoid")

# Minimax coefficients of e^r, from r^5 to r^2: largest relative error 1.06e-7 for |r| ≤ ln(2)/2
# (found by iteratively reweighted least squares).
EXP = (0.008312501432, 0.04189033218, 0.1666711539, 0.499992303)
# The complementary error function is t·exp(-z² + P(t)) with t = 1 / (1 + z/2) for z ≥ 0, with a
# relative error below 1.2e-7: the Chebyshev fit of "Numerical Recipes", from t^9 to t^0.
ERFC = (
    *(0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807),
    *(-0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223),
)
ROUND = 12582912.0  # 1.5 · 2^23: adding it rounds a number to an integer, in its lowest bits
LN2 = math.log(2)
SATURATED = 10.0  # beyond it tanh is 1
LARGE = 1e15  # beyond it the error function is 1
AVX512 = 16  # numbers in a vector
TOGETHER = 4  # vectors computed concurrently: their instructions are interleaved to hide latency
LOWEST, HIGHEST = -87.0, 88.0  # exponents between which e^x is a normal number
SMALLEST, LARGEST = -87.336544, 88.72283  # the lowest and highest ones, to six digits


def number(value: float) -> str:
    """Return a float32 number in LLVM's notation: the bits of the number as float64.

    Example:
        >>> number(0.5)
        '0x3FE0000000000000'
    """
    rounded = struct.unpack("f", struct.pack("f", value))[0]
    return f"0x{struct.unpack('Q', struct.pack('d', rounded))[0]:016X}"


def function_name(activation: str, width: int) -> str:
    """Return the name of the function of an activation.

    Example:
        >>> function_name("silu", 16)
        'silu_16'
    """
    return f"{activation}_{width}"


class VectorCode:
    """Writes arithmetic on vectors of float32 numbers.

    Args:
        width: numbers in a vector.
        prefix: of the names of results.

    Example:
        >>> code = VectorCode(8)
        >>> code.op("fadd", "%x", code.constant(1.0))
        '%t0'
        >>> code.lines[0][:33]
        '  %t0 = fadd <8 x float> %x, <flo'
    """

    def __init__(self, width: int, prefix: str = "t") -> None:
        self.width, self.lines, self._prefix, self._count = width, list[str](), prefix, 0
        self.floats, self.ints = f"<{width} x float>", f"<{width} x i32>"
        self.bools, self.suffix = f"<{width} x i1>", f"v{width}f32"  # of intrinsic functions

    def constant(self, value: float) -> str:
        """Return a vector of equal numbers."""
        return f"<{', '.join([f'float {number(value)}'] * self.width)}>"

    def integers(self, value: int) -> str:
        """Return a vector of equal integers."""
        return f"<{', '.join([f'i32 {value}'] * self.width)}>"

    def set(self, instruction: str) -> str:
        """Append an instruction and return the name of its result."""
        name = f"%{self._prefix}{self._count}"
        self._count += 1
        self.lines.append(f"  {name} = {instruction}")
        return name

    def op(self, operation: str, a: str, b: str) -> str:
        """Append an operation on two vectors of float32 numbers."""
        return self.set(f"{operation} {self.floats} {a}, {b}")

    def fma(self, a: str, b: str, c: str) -> str:
        """Append a·b + c."""
        v = self.floats
        return self.set(f"call {v} @llvm.fmuladd.{self.suffix}({v} {a}, {v} {b}, {v} {c})")

    def choose(self, test: str, a: str, b: str, x: str, y: str) -> str:
        """Append x if a comparison of a and b holds, otherwise y."""
        holds = self.set(f"fcmp {test} {self.floats} {a}, {b}")
        return self.set(f"select {self.bools} {holds}, {self.floats} {x}, {self.floats} {y}")

    def absolute(self, x: str) -> str:
        """Append |x|."""
        return self.set(f"call {self.floats} @llvm.fabs.{self.suffix}({self.floats} {x})")

    def at_most(self, a: str, bound: float, test: str = "ogt") -> str:
        """Append the smaller of a vector and a bound; the larger if `test` is "olt"."""
        return self.choose(test, a, self.constant(bound), self.constant(bound), a)

    def polynomial(self, x: str, coefficients: tuple[float, ...]) -> str:
        """Append a polynomial; its coefficients begin with that of the highest power."""
        sum_ = self.constant(coefficients[0])
        for c in coefficients[1:]:
            sum_ = self.fma(sum_, x, self.constant(c))
        return sum_

    def _power(self, x: str, sign: int = 1) -> tuple[str, str]:
        """Append e^r - 1 and the bits of n · 2^23, where sign · x = n · ln(2) + r."""
        v, iv = self.floats, self.ints
        shifted = self.fma(x, self.constant(sign / LN2), self.constant(ROUND))
        n = self.op("fsub", shifted, self.constant(ROUND))
        r = self.fma(n, self.constant(-sign * LN2), x)  # sign · r, so that -x is never needed
        powers = range(len(EXP) + 1, 1, -1)
        inner = self.polynomial(r, tuple(c * sign**k for c, k in zip(EXP, powers, strict=True)))
        square = self.op("fmul", r, r)
        bits = self.set(f"bitcast {v} {shifted} to {iv}")
        linear = r if sign > 0 else self.set(f"fneg {v} {r}")
        # The lowest bits of `shifted` are n.
        return self.fma(inner, square, linear), self.set(f"shl {iv} {bits}, {self.integers(23)}")

    def _scaled(self, x: str, exponent: str) -> str:
        """Append 2^n · x, by adding n to the exponent of x."""
        v, iv = self.floats, self.ints
        scaled = self.set(f"add {iv} {exponent}, {self.set(f'bitcast {v} {x} to {iv}')}")
        return self.set(f"bitcast {iv} {scaled} to {v}")

    def exp(self, x: str) -> str:
        """Append e^x; NaN stays NaN."""
        return self._exp(self.at_most(self.at_most(x, HIGHEST), LOWEST, "olt"))

    def exp_of_negative(self, x: str) -> str:
        """Append e^x for x ≤ 0, which is 0 far below 0; NaN stays NaN."""
        power = self._exp(x)  # far below 0 it is not used
        return self.choose("olt", x, self.constant(LOWEST), "zeroinitializer", power)

    def exp_of_any(self, x: str) -> str:
        """Append e^x; infinite above the largest float32, 0 below the normal ones, NaN for NaN."""
        power = self._exp(x)  # beyond the bounds it is not used
        zero, infinite = self.constant(0.0), self.constant(float("inf"))
        power = self.choose("olt", x, self.constant(SMALLEST), zero, power)
        return self.choose("ugt", x, self.constant(LARGEST), self.op("fmul", x, infinite), power)

    def _exp(self, x: str, sign: int = 1) -> str:
        """Append e^(sign · x), which is within the bounds."""
        rest, exponent = self._power(x, sign)
        return self._scaled(self.op("fadd", rest, self.constant(1.0)), exponent)

    def log(self, x: str) -> str:
        """Append ln(x) for a finite x ≥ 1; NaN stays NaN.

        Two steps of Halley's method begin with a line through the bits of x: its error is below
        0.04, and each step leaves less than the third power of it.
        """
        bits = self.set(f"bitcast {self.floats} {x} to {self.ints}")
        float_ = self.set(f"sitofp {self.ints} {bits} to {self.floats}")
        line = self.constant(LN2 / 2**23), self.constant(-LN2 * (127 - 0.043))
        y = self.fma(float_, *line)
        for _ in range(2):
            power = self._exp(y)
            less, more = self.op("fsub", x, power), self.op("fadd", x, power)
            y = self.fma(self.op("fdiv", less, more), self.constant(2.0), y)
        return y

    def tanh(self, x: str) -> str:
        """Append tanh(x) = y / (y + 2) with y = e^2x - 1; its relative error is small near 0."""
        x = self.at_most(self.at_most(x, SATURATED), -SATURATED, "olt")
        rest, exponent = self._power(self.op("fadd", x, x))
        one = self.set(f"bitcast {self.floats} {self.constant(1.0)} to {self.ints}")
        scale = self.set(f"add {self.ints} {exponent}, {one}")
        scale = self.set(f"bitcast {self.ints} {scale} to {self.floats}")
        y = self.fma(scale, rest, self.op("fsub", scale, self.constant(1.0)))
        return self.op("fmul", y, self.reciprocal(self.op("fadd", y, self.constant(2.0))))

    def reciprocal(self, x: str) -> str:
        """Append 1 / x for a finite x ≥ 1.

        With AVX-512, an estimate of 14 bits and one step of Newton's method replace the division,
        which blocks its unit for many cycles.
        """
        v = self.floats
        if self.width < AVX512:
            return self.op("fdiv", self.constant(1.0), x)
        name = "llvm.x86.avx512.rcp14.ps.512"
        estimate = self.set(f"call {v} @{name}({v} {x}, {v} zeroinitializer, i16 -1)")
        negative = self.set(f"fneg {v} {x}")
        rest = self.fma(negative, estimate, self.constant(1.0))
        return self.fma(rest, estimate, estimate)

    def sigmoid(self, x: str) -> str:
        """Append 1 / (1 + e^-x)."""
        return self._sigmoid(self.at_most(x, -HIGHEST, "olt"))

    def _sigmoid(self, x: str) -> str:
        """Append 1 / (1 + e^-x) for x ≥ -HIGHEST."""
        power = self._exp(self.at_most(x, -LOWEST), -1)
        return self.reciprocal(self.op("fadd", power, self.constant(1.0)))

    def normal(self, x: str) -> str:
        """Append the cumulative distribution function of the normal distribution."""
        z = self.op("fmul", self.absolute(x), self.constant(0.5**0.5))
        tail = self.op("fmul", self._erfc(z), self.constant(0.5))
        other = self.op("fsub", self.constant(1.0), tail)
        return self.choose("olt", x, "zeroinitializer", tail, other)

    def erf(self, x: str) -> str:
        """Append the error function, with an error below 2e-7."""
        v = self.floats
        value = self.op("fsub", self.constant(1.0), self._erfc(self.absolute(x)))
        return self.set(f"call {v} @llvm.copysign.{self.suffix}({v} {value}, {v} {x})")

    def _erfc(self, z: str) -> str:
        """Append the complementary error function of z ≥ 0."""
        z = self.at_most(z, LARGE)
        t = self.reciprocal(self.fma(z, self.constant(0.5), self.constant(1.0)))
        negative = self.set(f"fneg {self.floats} {z}")
        power = self.exp(self.fma(negative, z, self.polynomial(t, ERFC)))
        return self.op("fmul", t, power)

    def hard_sigmoid(self, x: str) -> str:
        """Append clamp(x + 3, 0, 6) / 6."""
        y = self.op("fadd", x, self.constant(3.0))
        y = self.at_most(self.at_most(y, 6.0), 0.0, "olt")
        return self.op("fmul", y, self.constant(1 / 6))

    def apply(self, activation: str, x: str) -> str:
        """Append an activation function."""
        if activation == "sigmoid":  # the arithmetic with bits makes a number of some NaN
            return self.choose("uno", x, x, x, self.sigmoid(x))
        if activation == "hardsigmoid":
            return self.hard_sigmoid(x)
        if activation == "tanh":
            return self.tanh(x)
        if activation in ("silu", "gelu_tanh"):  # the second factor does not fall below 6e-39
            x = self.at_most(x, -HIGHEST, "olt")
        if activation == "gelu_tanh":  # 1 + tanh(u) is 2 · sigmoid(2u)
            cube = self.fma(self.op("fmul", x, x), self.constant(0.044715), self.constant(1.0))
            inner = self.op("fmul", self.op("fmul", x, self.constant(1.5957691216057308)), cube)
            return self.op("fmul", x, self.sigmoid(inner))
        factor = {"silu": self._sigmoid, "gelu": self.normal, "hardswish": self.hard_sigmoid}
        return self.op("fmul", x, factor[activation](x))


def emit_activation(activation: str, width: int) -> Iterator[str]:
    """Yield the lines of the function `name(x, out, mask, n)` of an activation.

    It computes n vectors. Vectors of int32 at `mask`, unless it is null, have all bits set where
    the result is used, and 0 where it is set to 0. Functions that map 0 to 0 ignore the mask: the
    caller sets x to 0 there.

    Args:
        activation: one of `ACTIVATIONS`.
        width: float32 values in a vector.

    Example:
        >>> next(emit_activation("silu", 8))
        'define void @silu_8(ptr %x, ptr %out, ptr %mask, i64 %n) {'
    """
    code = FunctionText()
    is_masked = activation not in ZERO_AT_ZERO
    if is_masked:  # without a mask, read x instead; the value is not used
        code("%is.whole = icmp eq ptr %mask, null")
        code("%mask.safe = select i1 %is.whole, ptr %x, ptr %mask")
    code(f"%blocks = udiv i64 %n, {TOGETHER}")
    code(f"%rest = mul i64 %blocks, {TOGETHER}")
    with code.loop("%block", "0", "%blocks"):
        code(f"%i.first = mul i64 %block, {TOGETHER}")
        texts = []
        for j in range(TOGETHER):
            code(f"%i.{j} = add i64 %i.first, {j}")
            texts.append(_activated(activation, width, f"%i.{j}", f"u{j}.", is_masked))
        for line in (line for lines in zip(*texts, strict=True) for line in lines):
            code(line)
    with code.loop("%i", "%rest", "%n"):
        for line in _activated(activation, width, "%i", "u.", is_masked):
            code(line)
    name = function_name(activation, width)
    yield f"define void @{name}(ptr %x, ptr %out, ptr %mask, i64 %n) {{"
    yield "entry:"
    yield from code.lines
    yield "  ret void"
    yield "}"


def _activated(activation: str, width: int, index: str, prefix: str, is_masked: bool) -> list[str]:
    """Return the instructions for one vector of the row, whose results begin with a prefix."""
    vector = VectorCode(width, prefix)
    v, iv = vector.floats, vector.ints

    def at(pointer: str, of: str) -> str:
        return vector.set(f"getelementptr {of}, ptr {pointer}, i64 {index}")

    value = vector.set(f"load {v}, ptr {at('%x', v)}, align 4")
    result = vector.apply(activation, value)
    if is_masked:
        used = vector.set(f"load {iv}, ptr {at('%mask.safe', iv)}, align 4")
        used = vector.set(f"select i1 %is.whole, {iv} {vector.integers(-1)}, {iv} {used}")
        bits = vector.set(f"bitcast {v} {result} to {iv}")
        result = vector.set(f"bitcast {iv} {vector.set(f'and {iv} {bits}, {used}')} to {v}")
    out = at("%out", v)
    return [*(line.strip() for line in vector.lines), f"store {v} {result}, ptr {out}, align 4"]
