"""The text of a function in LLVM IR."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager


class FunctionText:
    """The text of a function with counted loops.

    Example:
        >>> code = FunctionText()
        >>> code("ret void")
        >>> code.lines
        ['  ret void']
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._block = "entry"
        self._numbers = itertools.count()

    def __call__(self, line: str) -> None:
        """Append an instruction."""
        self.lines.append("  " + line)

    def label(self, name: str) -> None:
        """Begin a basic block."""
        self.lines.append(f"{name}:")
        self._block = name

    @contextmanager
    def loop(self, counter: str, start: str, stop: str) -> Iterator[None]:
        """Repeat the instructions in the `with` block for each integer in [start, stop)."""
        name, before = f"{counter[1:]}.{next(self._numbers)}", self._block
        self(f"br label %{name}.test")
        self.label(f"{name}.test")
        self(f"{counter} = phi i64 [ {start}, %{before} ], [ {counter}.next, %{name}.end ]")
        self(f"%{name}.more = icmp slt i64 {counter}, {stop}")
        self(f"br i1 %{name}.more, label %{name}.body, label %{name}.after")
        self.label(f"{name}.body")
        yield
        self(f"br label %{name}.end")
        self.label(f"{name}.end")
        self(f"{counter}.next = add nsw i64 {counter}, 1")
        self(f"br label %{name}.test")
        self.label(f"{name}.after")

    def pointer(self, name: str, base: str, *terms: tuple[str, str]) -> None:
        """Compute the address of an element whose index is a sum of products."""
        self(f"%{name}.0 = add i64 0, 0")
        for k, (a, b) in enumerate(terms):
            self(f"%{name}.term.{k} = mul i64 {a}, {b}")
            self(f"%{name}.{k + 1} = add i64 %{name}.{k}, %{name}.term.{k}")
        self(f"%{name} = getelementptr float, ptr {base}, i64 %{name}.{len(terms)}")

    def clear(self, at: str, count: str) -> None:
        """Set bytes from an address on to 0."""
        self(f"call void @llvm.memset.p0.i64(ptr {at}, i8 0, i64 {count}, i1 false)")

    def fill(self, counter: str, base: str, start: str, stop: str) -> None:
        """Store the fill value in the elements [start, stop) of an array."""
        with self.loop(f"%{counter}", start, stop):
            self(f"%{counter}.at = getelementptr float, ptr {base}, i64 %{counter}")
            self(f"store float %fill, ptr %{counter}.at")


class VectorText(FunctionText):
    """The text of a function with vectors of float32 numbers.

    Args:
        width: numbers in a vector.

    Example:
        >>> code = VectorText(8)
        >>> code.load("x", code.at("x.at", "%rows", 8))
        '%x'
        >>> code.lines[1]
        '  %x = load <8 x float>, ptr %x.at, align 4'
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.vector = width, f"<{width} x float>"

    def at(self, name: str, base: str, index: object) -> str:
        """Append the address of an element of an array, and return its name."""
        self(f"%{name} = getelementptr float, ptr {base}, i64 {index}")
        return f"%{name}"

    def load(self, name: str, at: str) -> str:
        """Append the load of a vector, and return its name."""
        self(f"%{name} = load {self.vector}, ptr {at}, align 4")
        return f"%{name}"

    def store(self, value: str, at: str) -> None:
        """Append the store of a vector."""
        self(f"store {self.vector} {value}, ptr {at}, align 4")

    def splat(self, name: str, scalar: str, kind: str = "float") -> str:
        """Append a vector of equal numbers, and return its name."""
        v, zeros = f"<{self.width} x {kind}>", f"<{self.width} x i32> zeroinitializer"
        self(f"%{name}.one = insertelement {v} poison, {kind} {scalar}, i32 0")
        self(f"%{name} = shufflevector {v} %{name}.one, {v} poison, {zeros}")
        return f"%{name}"
