"""WebAssembly modules from the object files that LLVM writes, without a linker.

An object file for wasm32 is a module already: its code and data hold final indices and addresses,
as long as nothing else is linked to it. It lacks only exports, and imports its memory. This is for
one object file without PIC, whose functions call nothing but imports and one another.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..runtime.kernels import Target
from .errors import NativeExportError

# Every browser with vectors (Chromium 91, Firefox 89, Safari 16.4) has the other features too.
BROWSER = Target(
    "wasm32-unknown-unknown",
    "generic",
    "+simd128,+bulk-memory,+sign-ext,+nontrapping-fptoint",
    (4,),
)
PAGE = 65536  # bytes
HEADER = b"\0asm\x01\0\0\0"
CUSTOM, TYPE, IMPORT, FUNCTION, TABLE, MEMORY, GLOBAL, EXPORT = range(8)
START, ELEMENT, CODE, DATA, DATA_COUNT = range(8, 13)
ORDER = (TYPE, IMPORT, FUNCTION, TABLE, MEMORY, GLOBAL, EXPORT)
SYMBOL_TABLE, UNDEFINED, LOCAL, EXPLICIT_NAME = 8, 0x10, 0x02, 0x40
# Relocations whose fields hold the final values: indices of functions and types, and addresses.
KNOWN_RELOCATIONS = {0, 3, 4, 5, 6}


class Reader:
    """Reads numbers and texts of a WebAssembly file in order.

    Args:
        data: the bytes.

    Attributes:
        at: position of the next byte.

    Example:
        >>> Reader(b"\\x80\\x01\\x02hi").number()
        128
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def more(self) -> bool:
        """Whether bytes are left."""
        return self.at < len(self.data)

    def number(self) -> int:
        """Return an unsigned integer (LEB128)."""
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def signed(self) -> int:
        """Return a signed integer (LEB128)."""
        start = self.at
        value = self.number()
        bits = 7 * (self.at - start)
        return value - (1 << bits) if value >> (bits - 1) else value

    def bytes(self, size: int) -> bytes:
        """Return the next bytes."""
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self) -> str:
        """Return a text with its length before it."""
        return self.bytes(self.number()).decode()


def to_module(compiled: bytes) -> bytes:
    """Return the module of an object file.

    It exports its public functions, the memory (``memory``), and the address after its data
    (``__heap_base``, as linkers call it). Functions of the C library remain imports from ``env``.

    Args:
        compiled: an object file for `BROWSER`, see `compile_object`.

    Raises:
        NativeExportError: the object file needs a linker.

    Example:
        >>> from ..runtime.kernels import compile_object
        >>> module = to_module(compile_object(BROWSER, "define i32 @f() { ret i32 5 }"))
        >>> module[:4], b"__heap_base" in module
        (b'\\x00asm', True)
    """
    found = dict(_sections(compiled))
    symbols, end = _functions(found.get("linking", b"")), _end_of_data(found.get(DATA, b"\0"))
    for name in [name for name in found if str(name).startswith("reloc.")]:
        _check_relocations(found.pop(name))
    found[IMPORT] = _without_memory(found.get(IMPORT, b"\0"))
    if {TABLE, GLOBAL, EXPORT, START, ELEMENT} & found.keys():
        raise NativeExportError("The WebAssembly object file has sections that need a linker.")
    found[MEMORY] = b"\x01\0" + _number(-(-end // PAGE) or 1)
    found[GLOBAL] = b"\x01\x7f\0\x41" + _signed(end) + b"\x0b"  # constant i32
    exports = [(name, 0, index) for name, index in symbols.items()]
    exports += [("memory", 2, 0), ("__heap_base", 3, 0)]
    found[EXPORT] = _number(len(exports)) + b"".join(
        _text(name) + bytes([kind]) + _number(index) for name, kind, index in exports
    )
    order = [s for s in (*ORDER, DATA_COUNT, CODE, DATA) if s in found]
    return HEADER + b"".join(bytes([s]) + _number(len(found[s])) + found[s] for s in order)


def _sections(module: bytes) -> Iterator[tuple[int | str, bytes]]:
    """Yield the numbers of the sections, the names of custom ones, and their contents."""
    reader = Reader(module)
    if reader.bytes(len(HEADER)) != HEADER:
        raise NativeExportError("LLVM wrote no WebAssembly object file.")
    while reader.more:
        number = reader.bytes(1)[0]
        content = reader.bytes(reader.number())
        if number != CUSTOM:
            yield number, content
            continue
        inner = Reader(content)
        name = inner.text()
        yield name, content[inner.at :]


def _functions(linking: bytes) -> dict[str, int]:
    """Return the public functions that a module defines: their indices by name."""
    reader, found = Reader(linking), dict[str, int]()
    reader.number()  # version
    while reader.more:
        kind, content = reader.bytes(1)[0], Reader(reader.bytes(reader.number()))
        if kind != SYMBOL_TABLE:
            continue
        for _ in range(content.number()):
            symbol, flags = content.number(), content.number()
            if symbol == 1:  # data
                content.text()
                if not flags & UNDEFINED:
                    [content.number() for _ in range(3)]
                continue
            index = content.number()
            if symbol != 3 and (not flags & UNDEFINED or flags & EXPLICIT_NAME):
                name = content.text()
                if symbol == 0 and not flags & (UNDEFINED | LOCAL):
                    found[name] = index
    return found


def _end_of_data(data: bytes) -> int:
    """Return the address after the last data segment."""
    reader, end = Reader(data), 0
    for _ in range(reader.number()):
        if reader.number() != 0 or reader.bytes(1) != b"\x41":  # active, i32.const
            raise NativeExportError("The WebAssembly object file has data that needs a linker.")
        start = reader.signed()
        reader.bytes(1)  # end of the expression
        size = reader.number()
        reader.bytes(size)
        end = max(end, start + size)
    return end


def _check_relocations(content: bytes) -> None:
    reader = Reader(content)
    reader.number()  # section
    for _ in range(reader.number()):
        kind = reader.bytes(1)[0]
        reader.number(), reader.number()  # position, symbol
        if kind in (3, 4, 5):  # addresses have a distance
            reader.signed()
        if kind not in KNOWN_RELOCATIONS:
            raise NativeExportError(
                f"The WebAssembly object file has a relocation of kind {kind}; it needs a linker."
            )


def _without_memory(content: bytes) -> bytes:
    """Return the import section without the memory, which the module has itself."""
    reader, kept = Reader(content), []
    for _ in range(reader.number()):
        start = reader.at
        _, name = reader.text(), reader.text()
        kind = reader.bytes(1)[0]
        if kind == 0:
            reader.number()
            kept.append(content[start : reader.at])
        elif kind == 2:
            flags = reader.number()
            [reader.number() for _ in range(1 + flags % 2)]
        else:
            raise NativeExportError(f"The WebAssembly object file imports {name}.")
    return _number(len(kept)) + b"".join(kept)


def _number(value: int) -> bytes:
    found = bytearray()
    while value >= 128:
        found.append(value % 128 + 128)
        value //= 128
    return bytes([*found, value])


def _signed(value: int) -> bytes:
    """Return a number ≥ 0 as a signed integer."""
    found = bytearray()
    while value >= 64:
        found.append(value % 128 + 128)
        value //= 128
    return bytes([*found, value])


def _text(value: str) -> bytes:
    data = value.encode()
    return _number(len(data)) + data
