"""LLVM IR of the sparse convolution kernels.

A tap is a nonzero weight: a constant offset in pixels from an output pixel to an input pixel, and
the weight's value. A work item is one tile of pixels of one block of groups of output channels:

    if i0 == 0:
        set the memory before and after the output to 0
    for i in range(i0, i1):
        tile, block = order[i]
        p = min(tile * tile_pixels, last)
        for g in range(blocks[block], blocks[block + 1]):
            o = channels[g * tile_channels : (g + 1) * tile_channels]
            y = bias[o]                                       # stays in registers
            for k in range(rows[g], rows[g + 1]):
                offset, weights = taps[k]
                y = combine(y, weights, x[p + offset])
            out[o, p] = activation(clamp(y + residual[o, p], low, high)) & mask[p]
            if p == last:
                set the rows of padding below the last image to 0

where the inner loop of `order` is over the tiles of a block, or over the blocks of a tile:

    if by_block:
        order = [(tile, block) for block in range(n_blocks) for tile in range(n_tiles)]
    else:
        order = [(tile, block) for tile in range(n_tiles) for block in range(n_blocks)]

`p` stands for `tile_pixels` consecutive pixels. Each function below emits one level of this
loop nest. Comparisons propagate NaN, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .activations import AVX512
from .records import CONVOLUTION, fields
from .tiles import Tile

# Types of the fields of a record that are not pointers.
FIELD_TYPES = {
    "low": "float",
    "high": "float",
    **dict.fromkeys(("inner", "by_block", "plane", "last", "tail"), "i64"),
    **dict.fromkeys(("lead_bytes", "trail_bytes"), "i64"),
}


class Variant(NamedTuple):
    """A convolution kernel.

    Attributes:
        tile: output that it keeps in registers.
        combine: "fma" adds pixel times weight; "max" takes the larger of pixel and sum and ignores
            the weight.
        residual: whether it adds a residual.
        mask: whether it sets pixels between images to 0.

    Example:
        >>> Variant(Tile(4, 8, 2), "fma", residual=True, mask=False).name
        'fma_4x8x2_residual'
    """

    tile: Tile
    combine: str
    residual: bool
    mask: bool

    @property
    def name(self) -> str:
        """Name of the function."""
        size = "x".join(map(str, self.tile))
        return f"{self.combine}_{size}" + "_residual" * self.residual + "_mask" * self.mask

    @property
    def floats(self) -> str:
        """LLVM type of a vector of pixels."""
        return f"<{self.tile.width} x float>"

    @property
    def ints(self) -> str:
        """LLVM type of a vector of int32."""
        return f"<{self.tile.width} x i32>"

    @property
    def cells(self) -> list[tuple[int, int]]:
        """Channel and vector of each register of the tile."""
        return [(r, j) for r in range(self.tile.channels) for j in range(self.tile.vectors)]


def declare_intrinsics(width: int) -> Iterator[str]:
    """Yield the declarations that the kernels of one vector width need.

    `fmuladd` is fused on processors that have an instruction for it, and otherwise a product and a
    sum. (`fma` would be a call of the C library for each number there.)

    Args:
        width: float32 values in a vector.

    Example:
        >>> next(declare_intrinsics(2))
        'declare <2 x float> @llvm.fmuladd.v2f32(<2 x float>, <2 x float>, <2 x float>)'
    """
    v = f"<{width} x float>"
    yield f"declare {v} @llvm.fmuladd.v{width}f32({v}, {v}, {v})"
    yield f"declare {v} @llvm.maximum.v{width}f32({v}, {v})"
    yield f"declare {v} @llvm.minimum.v{width}f32({v}, {v})"
    yield f"declare {v} @llvm.fabs.v{width}f32({v})"
    yield f"declare {v} @llvm.sqrt.v{width}f32({v})"
    if width == AVX512:
        yield f"declare {v} @llvm.x86.avx512.rcp14.ps.512({v}, {v}, i16)"


def emit_convolution(variant: Variant, activations: bool = False) -> Iterator[str]:
    """Yield the lines of the function `variant.name(record, i0, i1)`.

    Args:
        variant: the kernel.
        activations: whether it calls the activation function of its record, if there is one.

    Example:
        >>> variant = Variant(Tile(1, 4), "max", residual=False, mask=True)
        >>> next(emit_convolution(variant))
        'define void @max_1x4x1_mask(ptr %record, i64 %i0, i64 %i1) {'
    """
    yield f"define void @{variant.name}(ptr %record, i64 %i0, i64 %i1) {{"
    yield "entry:"
    if activations:
        (vectors, width, channels) = variant.tile
        yield f"  %buffer = alloca [{vectors * width * channels} x float], align 64"
    yield from _load_record(variant)
    yield from _clear_edges()
    yield from _begin_item(variant)
    yield from _begin_group(variant)
    yield from _combine_taps(variant)
    yield from _end_group(variant, activations)
    yield from _end_item()
    yield "}"


def _splat(variant: Variant, name: str, scalar: str) -> Iterator[str]:
    """Copy a scalar into all elements of a vector."""
    v = variant.floats
    yield f"  %{name}.one = insertelement {v} poison, float {scalar}, i32 0"
    yield f"  %{name} = shufflevector {v} %{name}.one, {v} poison, {variant.ints} zeroinitializer"


def _load_record(variant: Variant) -> Iterator[str]:
    for name, offset in fields(CONVOLUTION):
        yield f"  %{name}.field = getelementptr i8, ptr %record, i64 {offset}"
        yield f"  %{name}.value = load {FIELD_TYPES.get(name, 'ptr')}, ptr %{name}.field"
    yield from _splat(variant, "low", "%low.value")
    yield from _splat(variant, "high", "%high.value")


def _clear_edges() -> Iterator[str]:
    yield "  %is.first = icmp eq i64 %i0, 0"
    yield "  br i1 %is.first, label %edges, label %begin"
    yield "edges:"
    for edge in ("lead", "trail"):
        yield (
            f"  call void @llvm.memset.p0.i64(ptr %{edge}.value, i8 0, i64 %{edge}_bytes.value, "
            "i1 false)"
        )
    yield "  br label %begin"
    yield "begin:"
    yield "  %some = icmp ult i64 %i0, %i1"
    yield "  br i1 %some, label %start, label %exit"


def _find_first_item() -> Iterator[str]:
    """Divide the number of item i0 into those of the outer and the inner loop."""
    yield "start:"
    yield "  %outer.0 = udiv i64 %i0, %inner.value"
    yield "  %outer.items = mul i64 %outer.0, %inner.value"
    yield "  %within.0 = sub i64 %i0, %outer.items"
    yield "  br label %item"


def _begin_item(variant: Variant) -> Iterator[str]:
    yield from _find_first_item()
    yield "item:"
    yield "  %i = phi i64 [ %i0, %start ], [ %i.next, %item.end ]"
    for name in ("outer", "within"):
        yield f"  %{name} = phi i64 [ %{name}.0, %start ], [ %{name}.next, %item.end ]"
    yield "  %is.by.block = icmp ne i64 %by_block.value, 0"
    yield "  %t = select i1 %is.by.block, i64 %within, i64 %outer"
    yield "  %block = select i1 %is.by.block, i64 %outer, i64 %within"
    yield "  %block.at = getelementptr i64, ptr %blocks.value, i64 %block"
    yield "  %g0 = load i64, ptr %block.at"
    yield "  %block.after = getelementptr i64, ptr %block.at, i64 1"
    yield "  %g1 = load i64, ptr %block.after"
    yield f"  %p.unbound = mul i64 %t, {variant.tile.vectors * variant.tile.width}"
    yield "  %p.over = icmp ugt i64 %p.unbound, %last.value"
    yield "  %p = select i1 %p.over, i64 %last.value, i64 %p.unbound"
    yield "  %x = getelementptr float, ptr %x.value, i64 %p"
    if variant.mask:
        yield "  %mask = getelementptr i32, ptr %mask.value, i64 %p"
    yield "  %filled = icmp ult i64 %g0, %g1"
    yield "  br i1 %filled, label %group, label %item.end"


def _begin_group(variant: Variant) -> Iterator[str]:
    channels = variant.tile.channels
    yield "group:"
    yield "  %g = phi i64 [ %g0, %item ], [ %g.next, %group.next ]"
    yield "  %row = getelementptr i32, ptr %rows.value, i64 %g"
    yield "  %row.after = getelementptr i32, ptr %row, i64 1"
    for name, at in (("k0", "row"), ("k1", "row.after")):
        yield f"  %{name}.short = load i32, ptr %{at}"
        yield f"  %{name} = zext i32 %{name}.short to i64"
    yield f"  %g.first = mul i64 %g, {channels}"
    for r in range(channels):
        yield f"  %place.{r} = add i64 %g.first, {r}"
        yield f"  %o.at.{r} = getelementptr i32, ptr %channels.value, i64 %place.{r}"
        yield f"  %o.short.{r} = load i32, ptr %o.at.{r}"
        yield f"  %o.{r} = zext i32 %o.short.{r} to i64"
        yield f"  %bias.at.{r} = getelementptr float, ptr %bias.value, i64 %o.{r}"
        yield f"  %bias.here.{r} = load float, ptr %bias.at.{r}"
        yield from _splat(variant, f"bias.{r}", f"%bias.here.{r}")
    yield "  %tapped = icmp ult i64 %k0, %k1"
    yield "  br i1 %tapped, label %tap, label %group.end"


def _combine_taps(variant: Variant) -> Iterator[str]:
    (vectors, width, channels), v = variant.tile, variant.floats
    yield "tap:"
    yield "  %k = phi i64 [ %k0, %group ], [ %k.next, %tap ]"
    for r, j in variant.cells:
        yield f"  %sum.{r}.{j} = phi {v} [ %bias.{r}, %group ], [ %new.{r}.{j}, %tap ]"
    yield f"  %tap.place = mul i64 %k, {1 + channels}"
    yield "  %tap.at = getelementptr i32, ptr %taps.value, i64 %tap.place"
    yield "  %offset.short = load i32, ptr %tap.at"
    yield "  %offset = sext i32 %offset.short to i64"
    for r in range(channels):
        yield f"  %weight.at.{r} = getelementptr float, ptr %tap.at, i64 {1 + r}"
        yield f"  %weight.here.{r} = load float, ptr %weight.at.{r}"
        yield from _splat(variant, f"weight.{r}", f"%weight.here.{r}")
    yield "  %x.here = getelementptr float, ptr %x, i64 %offset"
    for j in range(vectors):
        yield f"  %x.at.{j} = getelementptr float, ptr %x.here, i64 {j * width}"
        yield f"  %x.{j} = load {v}, ptr %x.at.{j}, align 4"
    for r, j in variant.cells:
        if variant.combine == "fma":
            intrinsic, operands = "fmuladd", f"{v} %weight.{r}, {v} %x.{j}, {v} %sum.{r}.{j}"
        else:
            intrinsic, operands = "maximum", f"{v} %x.{j}, {v} %sum.{r}.{j}"
        yield f"  %new.{r}.{j} = call {v} @llvm.{intrinsic}.v{width}f32({operands})"
    yield "  %k.next = add i64 %k, 1"
    yield "  %k.more = icmp ult i64 %k.next, %k1"
    yield "  br i1 %k.more, label %tap, label %group.end"


def _end_group(variant: Variant, activations: bool) -> Iterator[str]:
    v = variant.floats
    yield "group.end:"
    for r, j in variant.cells:
        yield f"  %y.{r}.{j} = phi {v} [ %bias.{r}, %group ], [ %new.{r}.{j}, %tap ]"
    for r in range(variant.tile.channels):
        yield f"  %plane.first.{r} = mul i64 %o.{r}, %plane.value"
        yield f"  %q.{r} = add i64 %plane.first.{r}, %p"
        yield f"  %out.{r} = getelementptr float, ptr %out.value, i64 %q.{r}"
        if variant.residual:
            yield f"  %residual.{r} = getelementptr float, ptr %residual.value, i64 %q.{r}"
    for r, j in variant.cells:
        yield from _finish(variant, r, j)
    if activations:
        yield "  %is.linear = icmp eq ptr %activation.value, null"
        yield "  br i1 %is.linear, label %store, label %activate"
        yield from _activate(variant)
        yield "store:"
    for r, j in variant.cells:
        yield from _store(variant, f"{r}.{j}", f"%out.{r}", j)
    yield "  br label %group.done"
    yield "group.done:"
    yield from _clear_tail(variant)
    yield "group.next:"
    yield "  %g.next = add i64 %g, 1"
    yield "  %g.more = icmp ult i64 %g.next, %g1"
    yield "  br i1 %g.more, label %group, label %item.end"


def _finish(variant: Variant, r: int, j: int) -> Iterator[str]:
    """Add the residual to one register, and clamp it."""
    v, bv = variant.floats, f"<{variant.tile.width} x i1>"
    c, skip = f"{r}.{j}", j * variant.tile.width
    y = f"%y.{c}"
    if variant.residual:
        yield f"  %r.at.{c} = getelementptr float, ptr %residual.{r}, i64 {skip}"
        yield f"  %r.{c} = load {v}, ptr %r.at.{c}, align 4"
        yield f"  %yr.{c} = fadd {v} {y}, %r.{c}"
        y = f"%yr.{c}"
    for bound, test in (("low", "olt"), ("high", "ogt")):
        yield f"  %{bound}.is.{c} = fcmp {test} {v} {y}, %{bound}"
        yield f"  %{bound}.y.{c} = select {bv} %{bound}.is.{c}, {v} %{bound}, {v} {y}"
        y = f"%{bound}.y.{c}"


def _clear_tail(variant: Variant) -> Iterator[str]:
    """Set the vectors after the last tile to 0. They are padding, which needs no taps."""
    (vectors, width, channels), v = variant.tile, variant.floats
    yield "  %is.last = icmp eq i64 %p, %last.value"
    yield "  %has.tail = icmp ne i64 %tail.value, 0"
    yield "  %clears = and i1 %is.last, %has.tail"
    yield "  br i1 %clears, label %clear, label %group.next"
    yield "clear:"
    yield "  %z = phi i64 [ 0, %group.done ], [ %z.next, %clear ]"
    yield f"  %z.vector = add i64 %z, {vectors}"
    yield f"  %z.first = mul i64 %z.vector, {width}"
    for r in range(channels):
        yield f"  %z.at.{r} = getelementptr float, ptr %out.{r}, i64 %z.first"
        yield f"  store {v} zeroinitializer, ptr %z.at.{r}, align 4"
    yield "  %z.next = add i64 %z, 1"
    yield "  %z.more = icmp ult i64 %z.next, %tail.value"
    yield "  br i1 %z.more, label %clear, label %group.next"


def _activate(variant: Variant) -> Iterator[str]:
    """Store the tile in the buffer, and write the activation function of it to the output.

    The output itself cannot be the buffer: tiles overlap, and another thread may write it, too.
    """
    (vectors, width, channels), mask = variant.tile, "%mask" if variant.mask else "null"
    yield "activate:"
    for r in range(channels):
        yield f"  %buffer.{r} = getelementptr float, ptr %buffer, i64 {r * vectors * width}"
        for j in range(vectors):
            yield from _store(variant, f"{r}.{j}", f"%buffer.{r}", j, ".linear")
        yield (
            f"  call void %activation.value(ptr %buffer.{r}, ptr %out.{r}, ptr {mask}, "
            f"i64 {vectors})"
        )
    yield "  br label %group.done"


def _store(variant: Variant, cell: str, row: str, j: int, suffix: str = "") -> Iterator[str]:
    """Mask one register and store it as vector j of a row."""
    v, iv = variant.floats, variant.ints
    c, y, skip = f"{cell}{suffix}", f"%high.y.{cell}", j * variant.tile.width
    if variant.mask:
        yield f"  %m.at.{c} = getelementptr i32, ptr %mask, i64 {skip}"
        yield f"  %m.{c} = load {iv}, ptr %m.at.{c}, align 4"
        yield f"  %bits.{c} = bitcast {v} {y} to {iv}"
        yield f"  %masked.{c} = and {iv} %bits.{c}, %m.{c}"
        yield f"  %ym.{c} = bitcast {iv} %masked.{c} to {v}"
        y = f"%ym.{c}"
    yield f"  %out.at.{c} = getelementptr float, ptr {row}, i64 {skip}"
    yield f"  store {v} {y}, ptr %out.at.{c}, align 4"


def _end_item() -> Iterator[str]:
    yield "item.end:"
    yield "  %within.after = add i64 %within, 1"
    yield "  %within.done = icmp eq i64 %within.after, %inner.value"
    yield "  %within.next = select i1 %within.done, i64 0, i64 %within.after"
    yield "  %outer.step = zext i1 %within.done to i64"
    yield "  %outer.next = add i64 %outer, %outer.step"
    yield "  %i.next = add i64 %i, 1"
    yield "  %i.more = icmp ult i64 %i.next, %i1"
    yield "  br i1 %i.more, label %item, label %exit"
    yield "exit:"
    yield "  ret void"
