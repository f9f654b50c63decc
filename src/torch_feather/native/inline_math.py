"""Functions of the C library as LLVM IR, so that loops over them are inlined and use vectors.

A call for each number would take longer than the sparse layers, in a browser above all.
"""

from __future__ import annotations

from collections.abc import Callable

from ..runtime.kernels.activations import VectorCode, number


class ScalarCode(VectorCode):
    """Writes arithmetic on single float32 numbers.

    Example:
        >>> ScalarCode().constant(0.5)
        '0x3FE0000000000000'
    """

    def __init__(self) -> None:
        super().__init__(1)
        self.floats, self.ints, self.bools, self.suffix = "float", "i32", "i1", "f32"

    def constant(self, value: float) -> str:
        """Return a number."""
        return number(value)

    def integers(self, value: int) -> str:
        """Return an integer."""
        return str(value)


# By their names in `expressions.LIBRARY`.
INLINE: dict[str, Callable[[ScalarCode, str], str]] = {
    "exp": ScalarCode.exp_of_any,
    "erf": ScalarCode.erf,
    "tanh": ScalarCode.tanh,
}
INTRINSICS = (
    "declare float @llvm.fmuladd.f32(float, float, float)",
    "declare float @llvm.fabs.f32(float)",
    "declare float @llvm.copysign.f32(float, float)",
)


def inline_name(function: str) -> str:
    """Return the name of an inlined function; LLVM knows the names of the C library.

    Example:
        >>> inline_name("exp")
        'inline_exp'
    """
    return f"inline_{function}"


def emit_inline(function: str) -> list[str]:
    """Return the lines of an inlined function. It calls some of `INTRINSICS`.

    Args:
        function: a key of `INLINE`.

    Example:
        >>> emit_inline("exp")[0]
        'define internal float @inline_exp(float %x) alwaysinline {'
    """
    code = ScalarCode()
    result = INLINE[function](code, "%x")
    head = f"define internal float @{inline_name(function)}(float %x) alwaysinline {{"
    return [head, *code.lines, f"  ret float {result}", "}"]
