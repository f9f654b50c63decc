"""Functions of the C library as LLVM IR, so that loops over them are inlined and use vectors.

In a browser, a call of JavaScript for each number would take longer than the convolutions.
"""

from __future__ import annotations

from ..runtime.kernels.activations import ERFC, VectorCode, number

LN4 = 1.3862943611198906
LARGEST = 88.722839  # the exponential of larger numbers is infinite in float32
SMALLEST = -87.336544  # that of smaller ones is below the normal numbers
HIGH = 80.0  # from here, a quarter of the exponential is computed and multiplied by 4


class ScalarCode(VectorCode):
    """Writes arithmetic on single float32 numbers.

    Example:
        >>> ScalarCode().constant(0.5)
        '0x3FE0000000000000'
    """

    def __init__(self) -> None:
        super().__init__(1)
        self.floats, self.ints = "float", "i32"

    def constant(self, value: float) -> str:
        """Return a number."""
        return number(value)

    def integers(self, value: int) -> str:
        """Return an integer."""
        return str(value)

    def fma(self, a: str, b: str, c: str) -> str:
        """Append a·b + c."""
        return self.op("fadd contract", self.op("fmul contract", a, b), c)

    def choose(self, test: str, a: str, b: str, x: str, y: str) -> str:
        """Append x if a comparison of a and b holds, otherwise y."""
        holds = self.set(f"fcmp {test} float {a}, {b}")
        return self.set(f"select i1 {holds}, float {x}, float {y}")

    def at_most(self, a: str, bound: float, test: str = "ogt") -> str:
        """Append the smaller of a number and a bound; the larger if `test` is "olt"."""
        return self.choose(test, a, self.constant(bound), self.constant(bound), a)

    def full_exp(self, x: str) -> str:
        """Append e^x, which is infinite for large x, and 0 for small x."""
        high = self.constant(HIGH)
        less = self.op("fsub", x, self.constant(LN4))
        power = self.exp(self.choose("ogt", x, high, less, x))
        quadruple = self.op("fmul", power, self.constant(4.0))
        power = self.choose("ogt", x, high, quadruple, power)
        infinite = self.constant(float("inf"))
        power = self.choose("ogt", x, self.constant(LARGEST), infinite, power)
        return self.choose("olt", x, self.constant(SMALLEST), self.constant(0.0), power)

    def erf(self, x: str) -> str:
        """Append the error function, with an error below 2e-7."""
        z = self.at_most(self.set(f"call float @llvm.fabs.f32(float {x})"), 10.0)
        t = self.reciprocal(self.fma(z, self.constant(0.5), self.constant(1.0)))
        negative = self.set(f"fneg float {z}")
        power = self.exp(self.fma(negative, z, self.polynomial(t, ERFC)))
        value = self.op("fsub", self.constant(1.0), self.op("fmul", t, power))
        return self.set(f"call float @llvm.copysign.f32(float {value}, float {x})")


def with_math(text: str) -> str:
    """Return a module of LLVM IR that computes exp and erf itself, if it declares them.

    Args:
        text: the module.

    Example:
        >>> with_math("declare float @expf(float)").splitlines()[0]
        'define internal float @expf(float %x) alwaysinline {'
        >>> with_math("declare float @logf(float)")
        'declare float @logf(float)'
    """
    for name, method in (("expf", ScalarCode.full_exp), ("erff", ScalarCode.erf)):
        declaration = f"declare float @{name}(float)"
        if declaration not in text:
            continue
        code = ScalarCode()
        result = method(code, "%x")
        lines = [f"define internal float @{name}(float %x) alwaysinline {{", *code.lines]
        more = [f"  ret float {result}", "}"]
        for intrinsic in ("fabs.f32(float)", "copysign.f32(float, float)"):
            needed = f"declare float @llvm.{intrinsic}"
            if name == "erff" and needed not in text:
                more.append(needed)
        text = text.replace(declaration, "\n".join([*lines, *more]))
    return text
