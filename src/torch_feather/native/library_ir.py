"""The functions of a native library as LLVM IR: create, run, destroy, and descriptions of tensors.

The memory of a model is one block: a header, the tap tables of all layers, and one slot per
concurrent call. A slot holds a flag (whether a call uses it), the records of the sparse layers, and
the activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..runtime.kernels import FunctionText, Target, declare_intrinsics, emit_convolution
from ..runtime.kernels.records import CONVOLUTION
from .llvm_ir import emit_functions, emit_nest
from .packing import emit_unpack
from .program import Buffer, Convolution, Loops, Nest, Program, View
from .tables import KernelCall, Tuning, kernel_call

OK, INVALID, NO_MEMORY, BUSY = range(4)  # results of the functions
LINE = 64  # bytes of a cache line
MAX_CONCURRENT = 4096


class LibraryText:
    """The LLVM IR of a library.

    Args:
        program: the network.
        target: the processor.
        name: prefix of the functions.
        tuning: measured tiles by the name of the weight.

    Attributes:
        constants: all tables and dense weights.

    Example:
        >>> text = LibraryText(Program(1).place(), Target("riscv64-linux-gnu"), "net")
        >>> "define i32 @net_run(" in text.module()
        True
    """

    def __init__(
        self, program: Program, target: Target, name: str, tuning: Tuning | None = None
    ) -> None:
        self.program, self.target, self.name = program, target, name
        self.constants = bytearray()
        self._places: dict[bytes, int] = {}
        self.calls: dict[Convolution, KernelCall] = {
            op: kernel_call(op, program.batch, target, tuning)
            for op in program.operations
            if isinstance(op, Convolution)
        }
        self.table_places: dict[KernelCall, int] = {}  # of tap tables, in bytes from the model
        self.slots = LINE  # where the first slot begins
        for call in self.calls.values():
            self.table_places[call] = self.slots
            self.slots += _lines(call.taps.table_bytes)
        self.nests: dict[Nest, str] = {}
        for op in program.operations:
            if isinstance(op, Loops):
                self.nests.setdefault(op.nest, f"nest_{len(self.nests)}")
        for buffer in program.constants():
            assert buffer.data is not None
            buffer.offset = self._place(buffer.data)

    def module(self) -> str:
        """Return the module."""
        records, fixups = self._records()
        slot = LINE + _lines(len(records)) + _lines(4 * self.program.workspace)
        create = list(self._create(slot, len(records), len(fixups)))
        parts = [
            *(line for width in self.target.widths for line in declare_intrinsics(width)),
            *emit_functions(self.nests),
            f"declare ptr @malloc({self._size})",
            "declare void @free(ptr)",
            "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)",
            "declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)",
            _bytes("constants", bytes(self.constants)),
            _bytes("records", records),
            _integers("fixups", [n for fixup in fixups for n in fixup]),
            *self._descriptions(),
            *self._nests(),
            *self._convolutions(),
            *emit_unpack(),
            *create,
            *self._run(slot, len(records)),
            *self._destroy(),
        ]
        return "\n".join(parts)

    @property
    def _size(self) -> str:
        """The type `size_t`."""
        return "i32" if self.target.architecture in ("wasm32", "riscv32", "arm") else "i64"

    def _nests(self) -> Iterator[str]:
        for nest, name in self.nests.items():
            yield from emit_nest(name, nest, self.target.widths)

    def _convolutions(self) -> Iterator[str]:
        for variant in dict.fromkeys(call.variant for call in self.calls.values()):
            first, *lines = emit_convolution(variant)
            yield first.replace("define void", "define internal void").replace("{", "noinline {")
            yield from lines

    def _place(self, array: np.ndarray) -> int:
        """Return where the bytes of an array are among the constants."""
        data = np.ascontiguousarray(array).tobytes()
        if data not in self._places:
            self.constants.extend(b"\0" * (-len(self.constants) % LINE))
            self._places[data] = len(self.constants)
            self.constants.extend(data)
        return self._places[data]

    def _records(self) -> tuple[bytes, list[tuple[int, int, int]]]:
        """Return the records of all layers, and which addresses in them must be set.

        Returns:
            The records, and for each address its position, whether it is an address of a constant
            (0), in the workspace (1) or in the model (2), and its distance from there in bytes.
        """
        records, fixups = bytearray(), []
        for call in self.calls.values():
            places = [(f, 0, self._place(a)) for f, a in call.tables.items()]
            places += [(f, 1, 4 * b.offset + n) for f, (b, n) in call.memory.items()]
            places.append(("taps", 2, self.table_places[call]))
            for field, base, offset in places:
                at = CONVOLUTION.fields[field][1]  # type: ignore[index]
                fixups.append((len(records) + int(at), base, offset))
            records.extend(call.record.tobytes())
        return bytes(records), fixups

    def _descriptions(self) -> Iterator[str]:
        """Yield the descriptions of the tensors, and the functions that return them."""
        for kind, views in (("input", self.program.inputs), ("output", self.program.outputs)):
            for i, view in enumerate(views):
                yield from _description(f"{kind}_{i}", view)
            table = ", ".join(f"ptr @{kind}_{i}" for i in range(len(views)))
            n = len(views)
            yield f"@{kind}s = internal constant [{n} x ptr] [{table}]"
            yield f"define ptr @{self.name}_{kind}(i32 %i) {{"
            yield f"  %known = icmp ult i32 %i, {n}"
            yield "  br i1 %known, label %found, label %unknown"
            yield "found:"
            yield "  %place = zext i32 %i to i64"
            yield f"  %at = getelementptr ptr, ptr @{kind}s, i64 %place"
            yield "  %tensor = load ptr, ptr %at"
            yield "  ret ptr %tensor"
            yield "unknown:"
            yield "  ret ptr null"
            yield "}"

    def _create(self, slot: int, records: int, fixups: int) -> Iterator[str]:
        code, size = FunctionText(), self._size
        code("%no.out = icmp eq ptr %out, null")
        code("%few = icmp slt i32 %concurrent, 1")
        code(f"%many = icmp sgt i32 %concurrent, {MAX_CONCURRENT}")
        code("%bad.number = or i1 %few, %many")
        code("%bad = or i1 %no.out, %bad.number")
        code("br i1 %bad, label %invalid, label %allocate")
        code.label("allocate")
        code("store ptr null, ptr %out")
        code("%n = zext i32 %concurrent to i64")
        code(f"%slots.bytes = mul i64 %n, {slot}")
        code(f"%bytes = add i64 %slots.bytes, {self.slots + LINE}")
        if size == "i32":
            code("%too.large = icmp ugt i64 %bytes, 2147483647")
            code("br i1 %too.large, label %no.memory, label %fits")
            code.label("fits")
            code("%bytes.size = trunc i64 %bytes to i32")
        else:
            code("%bytes.size = add i64 %bytes, 0")
        code(f"%raw = call ptr @malloc({size} %bytes.size)")
        code("%failed = icmp eq ptr %raw, null")
        code("br i1 %failed, label %no.memory, label %prepare")
        code.label("prepare")
        code(f"%raw.number = ptrtoint ptr %raw to {size}")
        code(f"%raw.up = add {size} %raw.number, {LINE}")
        code(f"%aligned = and {size} %raw.up, -{LINE}")
        code(f"%model = inttoptr {size} %aligned to ptr")
        code("store ptr %raw, ptr %model")
        code("%n.at = getelementptr i8, ptr %model, i64 8")
        code("store i64 %n, ptr %n.at")
        code("%slots.at = getelementptr i8, ptr %model, i64 16")
        code(f"store i64 {self.slots}, ptr %slots.at")  # for debuggers and tests
        self._unpack(code)
        with code.loop("%s", "0", "%n"):
            self._gep_slot(code, slot)
            code(f"call void @llvm.memset.p0.i64(ptr %slot, i8 0, i64 {slot}, i1 false)")
            code(f"%records = getelementptr i8, ptr %slot, i64 {LINE}")
            code(
                "call void @llvm.memcpy.p0.p0.i64(ptr %records, ptr @records, "
                f"i64 {records}, i1 false)"
            )
            code(f"%work = getelementptr i8, ptr %records, i64 {_lines(records)}")
            with code.loop("%f", "0", str(fixups)):
                _set_address(code)
        code("store ptr %model, ptr %out")
        code(f"ret i32 {OK}")
        code.label("invalid")
        code(f"ret i32 {INVALID}")
        code.label("no.memory")
        code(f"ret i32 {NO_MEMORY}")
        yield from _function(f"i32 @{self.name}_create(ptr %out, i32 %concurrent)", code)

    def _unpack(self, code: FunctionText) -> None:
        """Compute the tap tables."""
        for i, call in enumerate(self.calls.values()):
            taps = call.taps
            code(f"%table.{i} = getelementptr i8, ptr %model, i64 {self.table_places[call]}")
            pointers = [f"%table.{i}"]
            for name in ("distances", "values", "rows", "offsets"):
                place = self._place(getattr(taps, name))
                code(f"%{name}.{i} = getelementptr i8, ptr @constants, i64 {place}")
                pointers.append(f"%{name}.{i}")
            numbers = len(taps.rows) - 1, len(taps.offsets), taps.plane, taps.values.shape[1]
            arguments = [f"ptr {p}" for p in pointers] + [f"i64 {n}" for n in numbers]
            code(f"call void @unpack({', '.join(arguments)})")

    def _gep_slot(self, code: FunctionText, slot: int) -> None:
        code(f"%slot.first = mul i64 %s, {slot}")
        code(f"%slot.place = add i64 %slot.first, {self.slots}")
        code("%slot = getelementptr i8, ptr %model, i64 %slot.place")

    def _run(self, slot: int, records: int) -> Iterator[str]:
        code = FunctionText()
        for i, pointer in enumerate(("%model", "%inputs", "%outputs")):
            _return_if_null(code, pointer, f"given.{i}")
        for kind, views in (("input", self.program.inputs), ("output", self.program.outputs)):
            for i in range(len(views)):
                code(f"%{kind}.{i}.at = getelementptr ptr, ptr %{kind}s, i64 {i}")
                code(f"%{kind}.{i} = load ptr, ptr %{kind}.{i}.at")
                _return_if_null(code, f"%{kind}.{i}", f"given.{kind}.{i}")
        code("%n.at = getelementptr i8, ptr %model, i64 8")
        code("%n = load i64, ptr %n.at")
        code("br label %first")
        code.label("first")
        code("br label %search")
        code.label("search")
        code("%s = phi i64 [ 0, %first ], [ %s.next, %taken ]")
        self._gep_slot(code, slot)
        code("%old = cmpxchg ptr %slot, i32 0, i32 1 acquire monotonic")
        code("%won = extractvalue { i32, i1 } %old, 1")
        code("br i1 %won, label %compute, label %taken")
        code.label("taken")
        code("%s.next = add i64 %s, 1")
        code("%more = icmp ult i64 %s.next, %n")
        code("br i1 %more, label %search, label %busy")
        code.label("busy")
        code(f"ret i32 {BUSY}")
        code.label("invalid")
        code(f"ret i32 {INVALID}")
        code.label("compute")
        code(f"%records = getelementptr i8, ptr %slot, i64 {LINE}")
        code(f"%work = getelementptr i8, ptr %records, i64 {_lines(records)}")
        self._operations(code)
        code("store atomic i32 0, ptr %slot release, align 4")
        code(f"ret i32 {OK}")
        signature = f"i32 @{self.name}_run(ptr %model, ptr %inputs, ptr %outputs)"
        yield from _function(signature, code)

    def _operations(self, code: FunctionText) -> None:
        record = 0
        for i, op in enumerate(self.program.operations):
            if isinstance(op, Convolution):
                call = self.calls[op]
                code(f"%record.{i} = getelementptr i8, ptr %records, i64 {record}")
                code(f"call void @{call.variant.name}(ptr %record.{i}, i64 0, i64 {call.items})")
                record += CONVOLUTION.itemsize
                continue
            pointers = []
            for k, (buffer, offset) in enumerate((op.out, *op.operands)):
                code(f"%at.{i}.{k} = getelementptr i8, {_place_of(buffer, offset)}")
                pointers.append(f"ptr %at.{i}.{k}")
            code(f"call void @{self.nests[op.nest]}({', '.join(pointers)})")

    def _destroy(self) -> Iterator[str]:
        code = FunctionText()
        code("%none = icmp eq ptr %model, null")
        code("br i1 %none, label %done, label %some")
        code.label("some")
        code("%raw = load ptr, ptr %model")
        code("call void @free(ptr %raw)")
        code("br label %done")
        code.label("done")
        code("ret void")
        yield from _function(f"void @{self.name}_destroy(ptr %model)", code)


def _place_of(buffer: Buffer, offset: int) -> str:
    """Return base and distance in bytes of a number in a buffer."""
    if buffer.kind == "constant":
        return f"ptr @constants, i64 {buffer.offset + 4 * offset}"
    if buffer.kind == "work":
        return f"ptr %work, i64 {4 * (buffer.offset + offset)}"
    return f"ptr %{buffer.kind}.{buffer.index}, i64 {4 * offset}"


def _set_address(code: FunctionText) -> None:
    """Set the address that fixup `%f` describes."""
    code("%f.first = mul i64 %f, 3")
    for k, name in enumerate(("at", "base", "offset")):
        code(f"%f.{name}.place = add i64 %f.first, {k}")
        code(f"%f.{name}.at = getelementptr i64, ptr @fixups, i64 %f.{name}.place")
        code(f"%f.{name} = load i64, ptr %f.{name}.at")
    code("%f.field = getelementptr i8, ptr %records, i64 %f.at")
    code("%f.in.work = icmp eq i64 %f.base, 1")
    code("%f.in.model = icmp eq i64 %f.base, 2")
    code("%f.kept = select i1 %f.in.model, ptr %model, ptr @constants")
    code("%f.start = select i1 %f.in.work, ptr %work, ptr %f.kept")
    code("%f.pointer = getelementptr i8, ptr %f.start, i64 %f.offset")
    code("store ptr %f.pointer, ptr %f.field")


def _return_if_null(code: FunctionText, pointer: str, label: str) -> None:
    code(f"%{label}.null = icmp eq ptr {pointer}, null")
    code(f"br i1 %{label}.null, label %invalid, label %{label}")
    code.label(label)


def _function(signature: str, code: FunctionText) -> Iterator[str]:
    yield f"define {signature} {{"
    yield "entry:"
    yield from code.lines
    yield "}"


def _description(name: str, view: View) -> Iterator[str]:
    text, rank = name.encode() + b"\0", len(view.shape)
    yield f'@{name}.name = internal constant [{len(text)} x i8] c"{_escaped(text)}"'
    yield _integers(f"{name}.shape", view.shape)
    yield (
        f"@{name} = internal constant {{ ptr, i32, ptr, i64 }} {{ ptr @{name}.name, i32 {rank}, "
        f"ptr @{name}.shape, i64 {view.buffer.size} }}"
    )


def _integers(name: str, values: Sequence[int]) -> str:
    values = list(values) or [0]
    numbers = ", ".join(f"i64 {int(v)}" for v in values)
    return f"@{name} = internal constant [{len(values)} x i64] [{numbers}]"


def _bytes(name: str, data: bytes) -> str:
    data = data or b"\0"
    return f'@{name} = internal constant [{len(data)} x i8] c"{_escaped(data)}", align {LINE}'


def _escaped(data: bytes) -> str:
    text = data.hex().upper()
    return "".join(f"\\{text[i : i + 2]}" for i in range(0, len(text), 2))


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE
