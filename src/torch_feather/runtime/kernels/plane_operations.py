"""LLVM IR of the kernels from planes to planes that are no convolutions.

    mean          out[c, n] = factor · sum of x[c, n, p] over the pixels; padding is 0
    scale         out[c, n, p] = x[c, n, p] · y[c, n]
    scale_masked  the same & mask[p]
    activate      out[c, p] = activation(x[c, p]) & mask[p]; padding of x is 0
    scale_pixels  out[c, n, p] = x[c, n, p] · weight[n, p] & mask[n, p]
    layer_norm, softmax, log_softmax    of each pixel, over the channels, see `plane_channels`
    group_norm    of each image, over the pixels of some consecutive channels; also masked
    interleave_a  pixels of several channels, or repeated pixels of one
    gather        out[g · channels + c, n, p] = x[c, n, index[g, p]]
    rows, columns, max_rows, max_columns    combine rows or columns, see `plane_resampling`

The items are groups of `group_norm`, vectors of pixels over the channels, otherwise channels.
Some loops over pixels are written for single numbers; LLVM makes vectors of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from .plane_channels import OVER_CHANNELS, choose_mask, masked_vector
from .plane_reordering import clear_after_images, gather, interleave
from .plane_resampling import RESAMPLINGS, resample
from .records import PLANE_OPERATION, fields
from .text import FunctionText, VectorText

FACTORS = (1, 2, 3, 4, 8)  # columns of the result of `interleave` for each column of its input
INTERLEAVE = tuple(f"interleave_{n}" for n in FACTORS)
ARITHMETIC = {"add": "fadd", "subtract": "fsub", "multiply": "fmul"}  # instructions
OPERATIONS = (
    *("mean", "scale", "scale_masked", "scale_pixels", "activate"),
    *("group_norm", "group_norm_masked", "gather", *ARITHMETIC),
    *(*INTERLEAVE, *RESAMPLINGS, *OVER_CHANNELS),
)
FIELD_TYPES = {
    **dict.fromkeys(("x", "y", "out", "mask", "activation", "weight", "bias", "index"), "ptr"),
    **dict.fromkeys(("factor", "eps"), "float"),
}


def emit_plane_operation(name: str, width: int) -> Iterator[str]:
    """Yield the lines of the function `name(record, i0, i1)`.

    Args:
        name: one of `OPERATIONS`.
        width: float32 values in a vector.

    Example:
        >>> next(emit_plane_operation("mean", 8))
        'define void @mean(ptr noalias %record, i64 %i0, i64 %i1) {'
    """
    code = VectorText(width)
    for field, offset in fields(PLANE_OPERATION):
        code(f"%{field}.field = getelementptr i8, ptr %record, i64 {offset}")
        code(f"%{field} = load {FIELD_TYPES.get(field, 'i64')}, ptr %{field}.field")
    _clear_lead(code)
    writers: dict[str, Callable[[VectorText], None]] = {
        "mean": _mean,
        "scale": _scale,
        "scale_masked": partial(_scale, masked=True),
        "activate": _activate,
        "gather": gather,
        **{n: partial(_combine, instruction=op) for n, op in ARITHMETIC.items()},
        "scale_pixels": _scale_pixels,
        "group_norm": _group_norm,
        "group_norm_masked": partial(_group_norm, masked=True),
        **{n: partial(interleave, factor=f) for n, f in zip(INTERLEAVE, FACTORS, strict=True)},
        **{n: partial(resample, name=n) for n in RESAMPLINGS},
        **OVER_CHANNELS,
    }
    with code.loop("%i", "%i0", "%i1"):
        writers[name](code)
    yield f"define void @{name}(ptr noalias %record, i64 %i0, i64 %i1) {{"
    yield "entry:"
    if name == "mean" or name.startswith("group_norm"):
        yield "  %sum = alloca float"
        yield "  %total = alloca double"
    if name in OVER_CHANNELS:
        yield f"  %total = alloca {code.vector}, align 64"
    yield from code.lines
    yield "  ret void"
    yield "}"


def _clear_lead(code: FunctionText) -> None:
    code("%first = icmp eq i64 %i0, 0")
    code("%lead.here = select i1 %first, i64 %lead_bytes, i64 0")
    code("%lead.back = sub i64 0, %lead.here")
    code("%lead = getelementptr i8, ptr %out, i64 %lead.back")
    code("call void @llvm.memset.p0.i64(ptr %lead, i8 0, i64 %lead.here, i1 false)")


def _mean(code: FunctionText) -> None:
    with code.loop("%n", "0", "%images"):
        code.pointer("row", "%x", ("%i", "%x_plane"), ("%n", "%x_image"))
        code("store float 0.0, ptr %sum")
        with code.loop("%p", "0", "%pixels"):
            code("%at = getelementptr inbounds float, ptr %row, i64 %p")
            code("%pixel = load float, ptr %at")
            code("%before = load float, ptr %sum")
            code("%after = fadd reassoc contract float %before, %pixel")
            code("store float %after, ptr %sum")
        code("%all = load float, ptr %sum")
        code("%average = fmul float %all, %factor")
        code.pointer("to", "%out", ("%i", "%plane"), ("%n", "%image"))
        code("store float %average, ptr %to")


def _scale(code: FunctionText, masked: bool = False) -> None:
    with code.loop("%n", "0", "%images"):
        code.pointer("row", "%x", ("%i", "%x_plane"), ("%n", "%x_image"))
        code.pointer("scale.at", "%y", ("%i", "%y_plane"), ("%n", "%y_image"))
        code.pointer("to", "%out", ("%i", "%plane"), ("%n", "%image"))
        code("%scale = load float, ptr %scale.at")
        if masked:
            code.pointer("mask.row", "%mask", ("%n", "%image"))
        with code.loop("%p", "0", "%pixels"):
            code("%at = getelementptr inbounds float, ptr %row, i64 %p")
            code("%pixel = load float, ptr %at")
            code("%product = fmul float %pixel, %scale")
            code("%to.at = getelementptr inbounds float, ptr %to, i64 %p")
            if masked:
                code("%mask.at = getelementptr inbounds i32, ptr %mask.row, i64 %p")
                code("%mask.here = load i32, ptr %mask.at")
                code("%bits = bitcast float %product to i32")
                code("%bits.masked = and i32 %bits, %mask.here")
                code("store i32 %bits.masked, ptr %to.at")
            else:
                code("store float %product, ptr %to.at")
    code.pointer("channel", "%out", ("%i", "%plane"))
    clear_after_images(code, "%channel")


def _activate(code: VectorText) -> None:
    code.pointer("row", "%x", ("%i", "%x_plane"))
    code.pointer("to", "%out", ("%i", "%plane"))
    code(f"%vectors = udiv i64 %plane, {code.width}")
    code("call void %activation(ptr %row, ptr %to, ptr %mask, i64 %vectors)")


def _combine(code: VectorText, instruction: str) -> None:
    """Combine two planes, including their padding, which stays 0."""
    for name, of in (("row", "x"), ("other", "y")):
        code.pointer(name, f"%{of}", ("%i", f"%{of}_plane"))
    code.pointer("to", "%out", ("%i", "%plane"))
    code(f"%vectors = udiv i64 %plane, {code.width}")
    with code.loop("%p", "0", "%vectors"):
        code(f"%p.first = mul i64 %p, {code.width}")
        a = code.load("a", code.at("a.at", "%row", "%p.first"))
        b = code.load("b", code.at("b.at", "%other", "%p.first"))
        code(f"%result = {instruction} {code.vector} {a}, {b}")
        code.store("%result", code.at("to.at", "%to", "%p.first"))


def _scale_pixels(code: VectorText) -> None:
    code.pointer("row", "%x", ("%i", "%x_plane"))
    code.pointer("to", "%out", ("%i", "%plane"))
    choose_mask(code, "%row")
    code(f"%vectors = udiv i64 %plane, {code.width}")
    with code.loop("%p", "0", "%vectors"):
        code(f"%p.first = mul i64 %p, {code.width}")
        pixel = code.load("pixel", code.at("pixel.at", "%row", "%p.first"))
        factor = code.load("factor.here", code.at("factor.at", "%weight", "%p.first"))
        code(f"%product = fmul {code.vector} {pixel}, {factor}")
        code.store(masked_vector(code, "%product", "%p.first"), code.at("to.at", "%to", "%p.first"))


def _group_row(code: FunctionText, c: str) -> None:
    """Compute the address of channel c of group i in image n."""
    code(f"%{c}.own = add i64 %group, %{c}")
    code.pointer(f"{c}.row", "%x", (f"%{c}.own", "%x_plane"), ("%n", "%x_image"))


def _centered(code: FunctionText, c: str, p: str, mean: str = "%mean") -> str:
    """Load pixel p of channel c, less the mean. Return the name of the result."""
    code(f"%{p}.at = getelementptr inbounds float, ptr %{c}.row, i64 %{p}")
    code(f"%{p}.x = load float, ptr %{p}.at")
    code(f"%{p}.centered = fsub float %{p}.x, {mean}")
    return f"%{p}.centered"


def _used(code: FunctionText, p: str, value: str, masked: bool) -> str:
    """Set a value to 0 if pixel p is padding. Return the name of the result."""
    if not masked:
        return value
    code(f"%{p}.mask.at = getelementptr inbounds i32, ptr %mask.row, i64 %{p}")
    code(f"%{p}.mask = load i32, ptr %{p}.mask.at")
    code(f"%{p}.bits = bitcast float {value} to i32")
    code(f"%{p}.bits.used = and i32 %{p}.bits, %{p}.mask")
    code(f"%{p}.used = bitcast i32 %{p}.bits.used to float")
    return f"%{p}.used"


def _group_mean(code: FunctionText, names: tuple[str, str, str], masked: bool) -> None:
    """Average the pixels of a group, or the squares of their distances from the mean.

    The sums of channels are added in float64: there may be many of one sign.

    Args:
        code: the text.
        names: of the result, "mean" or "variance", and of the counters of channels and pixels.
        masked: whether there is padding.
    """
    name, c, p = names
    code("store double 0.0, ptr %total")
    with code.loop(f"%{c}", "0", "%channels"):
        _group_row(code, c)
        code("store float 0.0, ptr %sum")
        with code.loop(f"%{p}", "0", "%pixels"):
            value = _centered(code, c, p, "0.0" if name == "mean" else "%mean")
            value = _used(code, p, value, masked)
            if name == "variance":
                code(f"%{p}.square = fmul float {value}, {value}")
                value = f"%{p}.square"
            code(f"%{p}.before = load float, ptr %sum")
            code(f"%{p}.after = fadd reassoc contract float %{p}.before, {value}")
            code(f"store float %{p}.after, ptr %sum")
        code(f"%{c}.sum = load float, ptr %sum")
        code(f"%{c}.wide = fpext float %{c}.sum to double")
        code(f"%{c}.before = load double, ptr %total")
        code(f"%{c}.after = fadd double %{c}.before, %{c}.wide")
        code(f"store double %{c}.after, ptr %total")
    code(f"%{name}.total = load double, ptr %total")
    code(f"%{name}.factor = fpext float %factor to double")
    code(f"%{name}.wide = fmul double %{name}.total, %{name}.factor")
    code(f"%{name} = fptrunc double %{name}.wide to float")


def _group_norm(code: VectorText, masked: bool = False) -> None:
    """Normalize one group, whose number of channels is `channels`; `factor` is 1 / its pixels."""
    v = code.vector
    code("%group = mul i64 %i, %channels")
    with code.loop("%n", "0", "%images"):
        if masked:
            code.pointer("mask.row", "%mask", ("%n", "%image"))
        _group_mean(code, ("mean", "a", "p"), masked)
        _group_mean(code, ("variance", "b", "q"), masked)
        code("%variance.eps = fadd float %variance, %eps")
        code(f"%variance.all = insertelement {v} zeroinitializer, float %variance.eps, i32 0")
        code(f"%deviations = call {v} @llvm.sqrt.v{code.width}f32({v} %variance.all)")
        code(f"%deviation = extractelement {v} %deviations, i32 0")
        code("%inverse = fdiv float 1.0, %deviation")
        with code.loop("%c", "0", "%channels"):
            _group_row(code, "c")
            code.pointer("to", "%out", ("%c.own", "%plane"), ("%n", "%image"))
            for name in ("weight", "bias"):
                code(f"%{name}.at = getelementptr float, ptr %{name}, i64 %c.own")
                code(f"%{name}.here = load float, ptr %{name}.at")
            code("%scale = fmul float %inverse, %weight.here")
            with code.loop("%r", "0", "%pixels"):
                code(f"%r.product = fmul float {_centered(code, 'c', 'r')}, %scale")
                code("%r.sum = fadd float %r.product, %bias.here")
                value = _used(code, "r", "%r.sum", masked)
                code("%r.to = getelementptr inbounds float, ptr %to, i64 %r")
                code(f"store float {value}, ptr %r.to")
    with code.loop("%d", "0", "%channels"):
        code("%d.own = add i64 %group, %d")
        code.pointer("channel", "%out", ("%d.own", "%plane"))
        clear_after_images(code, "%channel")
