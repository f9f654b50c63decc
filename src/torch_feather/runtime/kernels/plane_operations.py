"""LLVM IR of the kernels from planes to planes that are no convolutions.

    mean          out[c, n] = factor · sum of x[c, n, p] over the pixels; padding is 0
    scale         out[c, n, p] = x[c, n, p] · y[c, n]
    scale_masked  the same & mask[p]
    activate      out[c, p] = activation(x[c, p]) & mask[p]; padding of x is 0
    scale_pixels  out[c, n, p] = x[c, n, p] · weight[n, p] & mask[n, p]
    layer_norm    of each pixel, over the channels
    group_norm    of each image, over the pixels of some consecutive channels; also masked
    interleave_a  pixels of several channels, or repeated pixels of one

The items of `layer_norm` are vectors of pixels, those of `group_norm` groups, all others channels.
Some loops over pixels are written for single numbers; LLVM makes vectors of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from .records import PLANE_OPERATION, fields
from .text import FunctionText

FACTORS = (1, 2, 3, 4, 8)  # columns of the result of `interleave` for each column of its input
INTERLEAVE = tuple(f"interleave_{n}" for n in FACTORS)
OPERATIONS = (
    *("mean", "scale", "scale_masked", "scale_pixels", "activate", "layer_norm"),
    *("group_norm", "group_norm_masked", *INTERLEAVE),
)
FIELD_TYPES = {
    **dict.fromkeys(("x", "y", "out", "mask", "activation", "weight", "bias"), "ptr"),
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
    code = FunctionText()
    for field, offset in fields(PLANE_OPERATION):
        code(f"%{field}.field = getelementptr i8, ptr %record, i64 {offset}")
        code(f"%{field} = load {FIELD_TYPES.get(field, 'i64')}, ptr %{field}.field")
    _clear_lead(code)
    writers = {
        "mean": _mean,
        "scale": _scale,
        "scale_masked": lambda code: _scale(code, masked=True),
        "activate": lambda code: _activate(code, width),
        "layer_norm": lambda code: _layer_norm(code, width),
        "scale_pixels": lambda code: _scale_pixels(code, width),
        "group_norm": lambda code: _group_norm(code, width),
        "group_norm_masked": lambda code: _group_norm(code, width, masked=True),
        **{
            name: lambda code, n=n: _interleave(code, n)  # type: ignore[misc]
            for name, n in zip(INTERLEAVE, FACTORS, strict=True)
        },
    }
    with code.loop("%i", "%i0", "%i1"):
        writers[name](code)
    yield f"define void @{name}(ptr noalias %record, i64 %i0, i64 %i1) {{"
    yield "entry:"
    if name == "mean" or name.startswith("group_norm"):
        yield "  %sum = alloca float"
        yield "  %total = alloca double"
    if name == "layer_norm":
        yield f"  %total = alloca <{width} x float>, align 64"
    yield from code.lines
    yield "  ret void"
    yield "}"


def _clear_lead(code: FunctionText) -> None:
    code("%first = icmp eq i64 %i0, 0")
    code("%lead.here = select i1 %first, i64 %lead_bytes, i64 0")
    code("%lead.back = sub i64 0, %lead.here")
    code("%lead = getelementptr i8, ptr %out, i64 %lead.back")
    code("call void @llvm.memset.p0.i64(ptr %lead, i8 0, i64 %lead.here, i1 false)")


def _pointer(code: FunctionText, name: str, base: str, *terms: tuple[str, str]) -> None:
    """Compute the address of an element whose index is a sum of products."""
    code(f"%{name}.0 = add i64 0, 0")
    for k, (a, b) in enumerate(terms):
        code(f"%{name}.term.{k} = mul i64 {a}, {b}")
        code(f"%{name}.{k + 1} = add i64 %{name}.{k}, %{name}.term.{k}")
    code(f"%{name} = getelementptr float, ptr {base}, i64 %{name}.{len(terms)}")


def _mean(code: FunctionText) -> None:
    with code.loop("%n", "0", "%images"):
        _pointer(code, "row", "%x", ("%i", "%x_plane"), ("%n", "%x_image"))
        code("store float 0.0, ptr %sum")
        with code.loop("%p", "0", "%pixels"):
            code("%at = getelementptr inbounds float, ptr %row, i64 %p")
            code("%pixel = load float, ptr %at")
            code("%before = load float, ptr %sum")
            code("%after = fadd reassoc contract float %before, %pixel")
            code("store float %after, ptr %sum")
        code("%all = load float, ptr %sum")
        code("%average = fmul float %all, %factor")
        _pointer(code, "to", "%out", ("%i", "%plane"), ("%n", "%image"))
        code("store float %average, ptr %to")


def _scale(code: FunctionText, masked: bool = False) -> None:
    with code.loop("%n", "0", "%images"):
        _pointer(code, "row", "%x", ("%i", "%x_plane"), ("%n", "%x_image"))
        _pointer(code, "scale.at", "%y", ("%i", "%y_plane"), ("%n", "%y_image"))
        _pointer(code, "to", "%out", ("%i", "%plane"), ("%n", "%image"))
        code("%scale = load float, ptr %scale.at")
        if masked:
            _pointer(code, "mask.row", "%mask", ("%n", "%image"))
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
    _pointer(code, "channel", "%out", ("%i", "%plane"))
    _clear_after_images(code, "%channel")


def _masked(code: FunctionText, value: str, width: int, pixel: str) -> str:
    """Set the pixels between images to 0, if there are any. Return the name of the result."""
    v, iv = f"<{width} x float>", f"<{width} x i32>"
    code(f"%mask.at = getelementptr i32, ptr %mask.safe, i64 {pixel}")
    code(f"%mask.here = load {iv}, ptr %mask.at, align 4")
    ones = f"<{', '.join(['i32 -1'] * width)}>"
    code(f"%mask.used = select i1 %is.whole, {iv} {ones}, {iv} %mask.here")
    code(f"%bits = bitcast {v} {value} to {iv}")
    code(f"%bits.masked = and {iv} %bits, %mask.used")
    code(f"%masked = bitcast {iv} %bits.masked to {v}")
    return "%masked"


def _choose_mask(code: FunctionText, other: str) -> None:
    """Without a mask, read another address instead; the value is not used."""
    code("%is.whole = icmp eq ptr %mask, null")
    code(f"%mask.safe = select i1 %is.whole, ptr {other}, ptr %mask")


def _activate(code: FunctionText, width: int) -> None:
    _pointer(code, "row", "%x", ("%i", "%x_plane"))
    _pointer(code, "to", "%out", ("%i", "%plane"))
    code(f"%vectors = udiv i64 %plane, {width}")
    code("call void %activation(ptr %row, ptr %to, ptr %mask, i64 %vectors)")


def _scale_pixels(code: FunctionText, width: int) -> None:
    v = f"<{width} x float>"
    _pointer(code, "row", "%x", ("%i", "%x_plane"))
    _pointer(code, "to", "%out", ("%i", "%plane"))
    _choose_mask(code, "%row")
    code(f"%vectors = udiv i64 %plane, {width}")
    with code.loop("%p", "0", "%vectors"):
        code(f"%p.first = mul i64 %p, {width}")
        for name, base in (("pixel", "row"), ("factor.here", "weight")):
            code(f"%{name}.at = getelementptr float, ptr %{base}, i64 %p.first")
            code(f"%{name} = load {v}, ptr %{name}.at, align 4")
        code(f"%product = fmul {v} %pixel, %factor.here")
        masked = _masked(code, "%product", width, "%p.first")
        code("%to.at = getelementptr float, ptr %to, i64 %p.first")
        code(f"store {v} {masked}, ptr %to.at, align 4")


def _group_row(code: FunctionText, c: str) -> None:
    """Compute the address of channel c of group i in image n."""
    code(f"%{c}.own = add i64 %group, %{c}")
    _pointer(code, f"{c}.row", "%x", (f"%{c}.own", "%x_plane"), ("%n", "%x_image"))


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


def _group_norm(code: FunctionText, width: int, masked: bool = False) -> None:
    """Normalize one group, whose number of channels is `channels`; `factor` is 1 / its pixels."""
    v = f"<{width} x float>"
    code("%group = mul i64 %i, %channels")
    with code.loop("%n", "0", "%images"):
        if masked:
            _pointer(code, "mask.row", "%mask", ("%n", "%image"))
        _group_mean(code, ("mean", "a", "p"), masked)
        _group_mean(code, ("variance", "b", "q"), masked)
        code("%variance.eps = fadd float %variance, %eps")
        code(f"%variance.all = insertelement {v} zeroinitializer, float %variance.eps, i32 0")
        code(f"%deviations = call {v} @llvm.sqrt.v{width}f32({v} %variance.all)")
        code(f"%deviation = extractelement {v} %deviations, i32 0")
        code("%inverse = fdiv float 1.0, %deviation")
        with code.loop("%c", "0", "%channels"):
            _group_row(code, "c")
            _pointer(code, "to", "%out", ("%c.own", "%plane"), ("%n", "%image"))
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
        _pointer(code, "channel", "%out", ("%d.own", "%plane"))
        _clear_after_images(code, "%channel")


def _layer_norm(code: FunctionText, width: int) -> None:
    """Normalize one vector of pixels. The sums stay in registers, as LLVM promotes the memory."""
    v = f"<{width} x float>"

    def splat(name: str, scalar: str) -> None:
        code(f"%{name}.one = insertelement {v} poison, float {scalar}, i32 0")
        code(
            f"%{name} = shufflevector {v} %{name}.one, {v} poison, <{width} x i32> zeroinitializer"
        )

    def pixels(counter: str) -> None:
        code(f"%{counter}.first = mul i64 %{counter}, %x_plane")
        code(f"%{counter}.at = getelementptr float, ptr %row, i64 %{counter}.first")
        code(f"%{counter}.x = load {v}, ptr %{counter}.at, align 4")

    code(f"%p = mul i64 %i, {width}")
    code("%row = getelementptr float, ptr %x, i64 %p")
    code("%to = getelementptr float, ptr %out, i64 %p")
    _choose_mask(code, "%row")
    splat("factor.all", "%factor")
    splat("eps.all", "%eps")
    code(f"store {v} zeroinitializer, ptr %total, align 64")
    with code.loop("%a", "0", "%channels"):
        pixels("a")
        code(f"%a.before = load {v}, ptr %total, align 64")
        code(f"%a.after = fadd {v} %a.before, %a.x")
        code(f"store {v} %a.after, ptr %total, align 64")
    code(f"%sum = load {v}, ptr %total, align 64")
    code(f"%mean = fmul {v} %sum, %factor.all")
    code(f"store {v} zeroinitializer, ptr %total, align 64")
    with code.loop("%b", "0", "%channels"):
        pixels("b")
        code(f"%b.centered = fsub {v} %b.x, %mean")
        code(f"%b.before = load {v}, ptr %total, align 64")
        arguments = f"{v} %b.centered, {v} %b.centered, {v} %b.before"
        code(f"%b.after = call {v} @llvm.fmuladd.v{width}f32({arguments})")
        code(f"store {v} %b.after, ptr %total, align 64")
    code(f"%squares = load {v}, ptr %total, align 64")
    arguments = f"{v} %squares, {v} %factor.all, {v} %eps.all"
    code(f"%variance = call {v} @llvm.fmuladd.v{width}f32({arguments})")
    code(f"%deviation = call {v} @llvm.sqrt.v{width}f32({v} %variance)")
    splat("one", "1.0")
    code(f"%inverse = fdiv {v} %one, %deviation")
    with code.loop("%c", "0", "%channels"):
        pixels("c")
        code(f"%c.centered = fsub {v} %c.x, %mean")
        for name in ("weight", "bias"):
            code(f"%{name}.at = getelementptr float, ptr %{name}, i64 %c")
            code(f"%{name}.here = load float, ptr %{name}.at")
            splat(f"{name}.all", f"%{name}.here")
        code(f"%c.scale = fmul {v} %inverse, %weight.all")
        arguments = f"{v} %c.centered, {v} %c.scale, {v} %bias.all"
        code(f"%c.y = call {v} @llvm.fmuladd.v{width}f32({arguments})")
        masked = _masked(code, "%c.y", width, "%p")
        code("%c.to = mul i64 %c, %plane")
        code("%to.at = getelementptr float, ptr %to, i64 %c.to")
        code(f"store {v} {masked}, ptr %to.at, align 4")


def _interleave(code: FunctionText, factor: int) -> None:
    """Compute one channel: pixel (y, x) is pixel (y / b, x / a) of channel (y mod b) · a + x mod a.

    Here a is the factor, and b is `factor_rows`. The channels are those of x that follow channel
    a · b · i. With `x_part` = 0 and `x_group` = `x_plane`, all of them are channel i, whose pixels
    are repeated. Pixels after the images are set to 0.
    """
    code(f"%full = udiv i64 %columns, {factor}")
    code(f"%full.columns = mul i64 %full, {factor}")
    code("%rest = sub i64 %columns, %full.columns")
    code("%padding = sub i64 %pitch, %columns")
    code("%padding.bytes = mul i64 %padding, 4")
    code("%out.rows = udiv i64 %image, %pitch")
    _pointer(code, "channel", "%out", ("%i", "%plane"))
    with code.loop("%n", "0", "%images"):
        with code.loop("%line", "0", "%rows"):
            code("%q = udiv i64 %line, %factor_rows")
            code("%q.first = mul i64 %q, %factor_rows")
            code("%a = sub i64 %line, %q.first")
            code(f"%part = mul i64 %a, {factor}")
            _pointer(code, "to", "%channel", ("%n", "%image"), ("%line", "%pitch"))
            row = (("%i", "%x_group"), ("%n", "%x_image"), ("%q", "%x_pitch"))
            for b in range(factor):
                code(f"%part.{b} = add i64 %part, {b}")
                _pointer(code, f"from.{b}", "%x", (f"%part.{b}", "%x_part"), *row)
            with code.loop("%p", "0", "%full"):
                code(f"%p.to = mul nsw i64 %p, {factor}")
                for b in range(factor):
                    code(f"%at.{b} = getelementptr inbounds float, ptr %from.{b}, i64 %p")
                    code(f"%pixel.{b} = load float, ptr %at.{b}")
                    code(f"%p.to.{b} = add nsw i64 %p.to, {b}")
                    code(f"%put.{b} = getelementptr inbounds float, ptr %to, i64 %p.to.{b}")
                    code(f"store float %pixel.{b}, ptr %put.{b}")
            with code.loop("%r", "0", "%rest"):
                code("%r.part = add i64 %part, %r")
                _pointer(code, "r.from", "%x", ("%r.part", "%x_part"), *row, ("%full", "1"))
                code("%r.pixel = load float, ptr %r.from")
                _pointer(code, "r.to", "%to", ("%full.columns", "1"), ("%r", "1"))
                code("store float %r.pixel, ptr %r.to")
            code("%end = getelementptr float, ptr %to, i64 %columns")
            _clear(code, "%end", "%padding.bytes")
        code("%below = sub i64 %out.rows, %rows")
        code("%below.pixels = mul i64 %below, %pitch")
        code("%below.bytes = mul i64 %below.pixels, 4")
        _pointer(code, "below.at", "%channel", ("%n", "%image"), ("%rows", "%pitch"))
        _clear(code, "%below.at", "%below.bytes")
    _clear_after_images(code, "%channel")


def _clear_after_images(code: FunctionText, channel: str) -> None:
    """Set the pixels after the last image of a channel to 0: they are above the next channel."""
    code("%images.end = mul i64 %images, %image")
    code("%after = sub i64 %plane, %images.end")
    code("%after.bytes = mul i64 %after, 4")
    code(f"%after.at = getelementptr float, ptr {channel}, i64 %images.end")
    _clear(code, "%after.at", "%after.bytes")


def _clear(code: FunctionText, at: str, count: str) -> None:
    code(f"call void @llvm.memset.p0.i64(ptr {at}, i8 0, i64 {count}, i1 false)")
