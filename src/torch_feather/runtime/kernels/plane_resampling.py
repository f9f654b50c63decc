"""LLVM IR of the kernels that combine rows, or columns, of images; see `runtime.resampling`.

    rows         out[c, n, y, x] = sum over t of weight[t, y] · x[c, n, index[t, y], x]
    columns      out[c, n, y, x] = sum over t of weight[t, x] · x[c, n, y, index[t, x]]
    max_rows     out[c, n, y, x] = maximum over t of x[c, n, index[t, y], x]
    max_columns  out[c, n, y, x] = maximum over t of x[c, n, y, index[t, x]]

The items are channels. The number of taps t is even, and each pass over a row of the result adds
two of them. LLVM makes vectors of the pixels of a row; it reads the columns one by one.
"""

from __future__ import annotations

from .plane_reordering import rows_of_channel
from .text import FunctionText

RESAMPLINGS = ("rows", "columns", "max_rows", "max_columns")
TAPS = 2  # that a pass reads


def resample(code: FunctionText, name: str) -> None:
    """Compute one channel.

    Args:
        code: of a function that has loaded its record; %i is the channel.
        name: one of `RESAMPLINGS`.

    Example:
        >>> code = FunctionText()
        >>> resample(code, "rows")
        >>> code.lines[0]
        '  %passes = udiv i64 %taps, 2'
    """
    code(f"%passes = udiv i64 %taps, {TAPS}")
    with rows_of_channel(code):
        code.pointer("from", "%x", ("%i", "%x_plane"), ("%n", "%x_image"))
        _pass(code, name, "first", "0")
        with code.loop("%pass", "1", "%passes"):
            _pass(code, name, "next", "%pass")


def _pass(code: FunctionText, name: str, p: str, number: str) -> None:
    """Add two taps to a row of the result, or begin the row with them.

    Args:
        code: the text.
        name: of the kernel.
        p: "first" if these are the first taps of the row, otherwise "next".
        number: of the pass.
    """
    is_max, of_rows = name.startswith("max"), name.endswith("rows")
    taps = range(TAPS)
    if of_rows:
        _load_taps(code, p, number, "%line", "%rows")
        for k in taps:
            code.pointer(f"{p}.row.{k}", "%from", (f"%{p}.position.{k}", "%x_pitch"))
    else:
        code.pointer(f"{p}.row", "%from", ("%line", "%x_pitch"))
    with code.loop(f"%{p}.j", "0", "%columns"):
        if not of_rows:
            _load_taps(code, p, number, f"%{p}.j", "%columns")
        code(f"%{p}.to = getelementptr inbounds float, ptr %to, i64 %{p}.j")
        value = ""
        if p == "next":
            code("%next.before = load float, ptr %next.to")
            value = "%next.before"
        for k in taps:
            row, column = (f"{p}.row.{k}", "j") if of_rows else (f"{p}.row", f"position.{k}")
            code(f"%{p}.at.{k} = getelementptr inbounds float, ptr %{row}, i64 %{p}.{column}")
            code(f"%{p}.pixel.{k} = load float, ptr %{p}.at.{k}")
            value = _larger(code, p, k, value) if is_max else _added(code, p, k, value)
        code(f"store float {value}, ptr %{p}.to")


def _load_taps(code: FunctionText, p: str, number: str, place: str, places: str) -> None:
    """Load position and weight of the taps of a pass.

    Args:
        code: the text.
        p: prefix of names.
        number: of the pass.
        place: the row or column of the result.
        places: how many of them there are.
    """
    for k in range(TAPS):
        code(f"%{p}.begin.{k} = mul i64 {number}, {TAPS}")
        code(f"%{p}.tap.{k} = add i64 %{p}.begin.{k}, {k}")
        code(f"%{p}.entries.{k} = mul i64 %{p}.tap.{k}, {places}")
        code(f"%{p}.entry.{k} = add i64 %{p}.entries.{k}, {place}")
        code(f"%{p}.index.{k} = getelementptr inbounds i32, ptr %index, i64 %{p}.entry.{k}")
        code(f"%{p}.short.{k} = load i32, ptr %{p}.index.{k}")
        code(f"%{p}.position.{k} = zext i32 %{p}.short.{k} to i64")
        code(f"%{p}.weight.at.{k} = getelementptr inbounds float, ptr %weight, i64 %{p}.entry.{k}")
        code(f"%{p}.weight.{k} = load float, ptr %{p}.weight.at.{k}")


def _added(code: FunctionText, p: str, k: int, before: str) -> str:
    """Add the product of pixel and weight of a tap. Return the name of the result."""
    code(f"%{p}.product.{k} = fmul contract float %{p}.pixel.{k}, %{p}.weight.{k}")
    if not before:
        return f"%{p}.product.{k}"
    code(f"%{p}.sum.{k} = fadd contract float {before}, %{p}.product.{k}")
    return f"%{p}.sum.{k}"


def _larger(code: FunctionText, p: str, k: int, before: str) -> str:
    """Take the pixel of a tap if it is larger, or NaN. Return the name of the result."""
    if not before:
        return f"%{p}.pixel.{k}"
    code(f"%{p}.above.{k} = fcmp ogt float %{p}.pixel.{k}, {before}")
    code(f"%{p}.nan.{k} = fcmp uno float %{p}.pixel.{k}, %{p}.pixel.{k}")
    code(f"%{p}.taken.{k} = or i1 %{p}.above.{k}, %{p}.nan.{k}")
    code(f"%{p}.max.{k} = select i1 %{p}.taken.{k}, float %{p}.pixel.{k}, float {before}")
    return f"%{p}.max.{k}"
