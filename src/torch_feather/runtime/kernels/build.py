"""Compilation of all kernels, once per process, and for other processors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import resources
from typing import Any

from .activations import ACTIVATIONS, emit_activation, function_name
from .attention import emit_attention
from .convolution import Variant, declare_intrinsics, emit_convolution
from .host import Target, host, llvm, openmp
from .plane_copy import COLUMN_STRIDES, declare_masked, emit_copy
from .plane_operations import OPERATIONS, emit_plane_operation
from .recurrence import ONE, emit_recurrence, recurrence_names
from .schedule import declare_waiting, emit_run, emit_run_team
from .tiles import tiles
from .transposition import emit_transpose


def variants(target: Target) -> list[Variant]:
    """Return all convolution kernels of a processor.

    Example:
        >>> variants(Target("wasm32"))[0].name
        'fma_1x4x1'
    """
    return [
        Variant(tile, combine, residual, mask)
        for tile in tiles(target.widths)
        for combine, residual in (("fma", False), ("fma", True), ("max", False))
        for mask in (False, True)
        if combine == "fma" or tile.channels == 1
    ]


def emit_module(
    target: Target, convolutions: Iterable[Variant] | None = None, team: bool = False
) -> str:
    """Return the LLVM IR of all functions.

    It has no inline assembly, because LLVM needs an assembler for it, which llvmlite has for the
    host only.

    Args:
        target: the processor.
        convolutions: convolution kernels. [default: `variants(target)`]
        team: whether to emit `run_team`, which calls OpenMP.

    Example:
        >>> "@fma_4x4x1(" in emit_module(Target("riscv64-linux-gnu"))
        True
    """
    convolutions = variants(target) if convolutions is None else convolutions
    width = target.widths[0]
    return "\n".join(
        [
            *_declarations(target),
            *declare_waiting(target),
            *declare_masked(width),
            *("\n".join(emit_convolution(variant, activations=True)) for variant in convolutions),
            *("\n".join(emit()) for emit in _functions(target).values()),
            "\n".join(emit_run(target)),
            *(("\n".join(emit_run_team()),) if team else ()),
        ]
    )


def _functions(target: Target) -> dict[str, Callable[[], Iterator[str]]]:
    """Return functions that yield the lines of all functions besides convolutions, by name."""
    width = target.widths[0]
    return {
        **{f"copy_{stride}": partial(emit_copy, stride, width) for stride in COLUMN_STRIDES},
        **{name: partial(emit_plane_operation, name, width) for name in OPERATIONS},
        "transpose": partial(emit_transpose, width),
        "attention": partial(emit_attention, width),
        **{
            function_name(a, w): partial(emit_activation, a, w)
            for a in ACTIVATIONS
            for w in target.widths
        },
    }


def _emit_runners(target: Target) -> str:
    """Return the LLVM IR of the functions that execute programs."""
    team = emit_run_team() if openmp() else ()
    return "\n".join([*declare_waiting(target), *emit_run(target), *team])


def _declarations(target: Target) -> Iterator[str]:
    for width in target.widths:
        yield from declare_intrinsics(width)
    yield "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)"


def emit_convolutions(
    target: Target, convolutions: Iterable[Variant], recurrent: Iterable[str] = ()
) -> str:
    """Return the LLVM IR of convolution kernels, and of those of recurrent layers, alone.

    Args:
        target: the processor.
        convolutions: convolution kernels.
        recurrent: some of `recurrence_names`.

    Example:
        >>> from torch_feather.runtime.kernels import Tile
        >>> kernel = Variant(Tile(4, 4, 1), "fma", residual=False, mask=False)
        >>> "@fma_4x4x1(" in emit_convolutions(Target("riscv64-linux-gnu"), [kernel])
        True
    """
    kernels = ("\n".join(emit_convolution(v, activations=True)) for v in convolutions)
    others = ("\n".join(emit_recurrence(name, target.widths[0])) for name in recurrent)
    return "\n".join([*_declarations(target), ONE, *kernels, *others])


def emit_object(target: Target, convolutions: Iterable[Variant] | None = None) -> bytes:
    """Return an object file of all functions for any processor that LLVM knows.

    The functions do not use OpenMP. The file needs `memset`, and `usleep` except on Windows.

    Args:
        target: the processor.
        convolutions: convolution kernels. [default: `variants(target)`]

    Example:
        >>> emit_object(Target("aarch64-linux-gnu"), convolutions=[])[:4]
        b'\\x7fELF'
    """
    return compile_object(target, emit_module(target, convolutions))


def compile_object(target: Target, text: str) -> bytes:
    """Return an object file of LLVM IR; see `Target.machine` for its code.

    Args:
        target: the processor.
        text: LLVM IR.

    Example:
        >>> compile_object(Target("riscv64-linux-gnu"), "define void @f() { ret void }")[:4]
        b'\\x7fELF'
    """
    machine = target.machine(for_files=True)
    layout = f'target triple = "{target.triple}"\ntarget datalayout = "{machine.target_data}"\n'
    return bytes(machine.emit_object(_optimized(layout + text, machine)))


def _optimized(text: str, machine: Any) -> Any:
    """Return the module of this LLVM IR, optimized for a target machine.

    It takes half of the time of a compilation. Convolution kernels do not need it: the instructions
    of their innermost loop are the same without.
    """
    binding = llvm()
    module = binding.parse_assembly(text)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.slp_vectorization = options.loop_unrolling = False  # tiles are vectors already
    options.loop_vectorization = True  # for copies
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


class KernelLibrary:
    """The compiled functions. Use `library()` to get the one of this process.

    Functions are compiled when they are needed, convolution kernels some at once.

    Args:
        target: a processor whose code the host can execute.
        objects: object files with the names of their convolution kernels. The first one has all
            other functions (`base` of another library of this target). [default: they are compiled]

    Attributes:
        target: the processor.
        tiles: tiles of its convolution kernels.
        objects: the object file of each compiled module, with the names of its kernels.
        run: function (operations, number of operations, thread, threads, barrier) that releases the
            GIL.
        run_team: function (operations, number of operations, threads, barrier) that calls `run` on
            PyTorch's own OpenMP threads, or None if PyTorch does not use OpenMP. Other threads
            would compete for the cores with PyTorch's, which poll for work for a while after each
            operator.

    Example:
        >>> kernels = library()
        >>> from torch_feather.runtime.kernels import Tile
        >>> kernel = Variant(Tile(2, kernels.target.widths[0], 1), "fma", False, False)
        >>> kernels.convolution(kernel) == kernels.convolution(kernel)
        True
    """

    def __init__(
        self, target: Target, objects: Sequence[tuple[Sequence[str], bytes]] | None = None
    ) -> None:
        binding = llvm()
        for name, address in openmp().items():
            binding.add_symbol(name, address)
        self.target, self.tiles = target, tiles(target.widths)
        self.objects: list[tuple[Sequence[str], bytes]] = []
        self._engines: list[Any] = []
        self._convolutions: dict[str, int] = {}  # and recurrent layers
        self._lock = threading.Lock()
        if objects is None:
            self._add((), text=_emit_runners(target))
        else:
            for names, data in objects:
                self._add(names, data=data)
        self._has_base = objects is not None
        self._base = self.objects[0][1] if self._has_base else None
        self._functions: dict[str, int] = {}
        address_of = self._engines[0].get_function_address
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        run = ctypes.CFUNCTYPE(None, pointer, number, number, number, pointer)
        self.run = run(address_of("run"))
        run_team = ctypes.CFUNCTYPE(None, pointer, number, number, pointer)
        self.run_team = run_team(address_of("run_team")) if openmp() else None

    def function(self, name: str) -> int:
        """Return the address of a function, which is compiled at the first call.

        Args:
            name: "copy_" and a distance between columns of the source, or None for any distance;
                a kernel of `plane_operations`; "transpose"; or "attention".
        """
        with self._lock:
            if name not in self._functions:
                self._functions[name] = self._compiled(name)
            return self._functions[name]

    def activation(self, name: str, width: int) -> int:
        """Return the address of an activation function of vectors, compiled at the first call."""
        return self.function(function_name(name, width))

    @property
    def base(self) -> bytes:
        """An object file of all functions besides convolutions."""
        if self._base is None:
            # Without a data layout, which costs some kernels 1 to 4%.
            text = emit_module(self.target, (), team=bool(openmp()))
            machine = self.target.machine()
            self._base = bytes(machine.emit_object(_optimized(text, machine)))
        return self._base

    def _compiled(self, name: str) -> int:
        if not self._has_base:
            lines = _functions(self.target)[name]()
            width = self.target.widths[0]
            text = [*_declarations(self.target), *declare_masked(width), *lines]
            self._add((), text="\n".join(text))
            return int(self._engines[-1].get_function_address(name))
        return int(self._engines[0].get_function_address(name))

    def convolution(self, variant: Variant) -> int:
        """Return the address of a convolution kernel, which is compiled at the first call."""
        self.compile([variant])
        return self._convolutions[variant.name]

    def compile(self, variants: Iterable[Variant]) -> None:
        """Compile convolution kernels together, which is faster than one by one."""
        with self._lock:
            missing = [v for v in dict.fromkeys(variants) if v.name not in self._convolutions]
            if missing:
                names = [v.name for v in missing]
                self._add(names, text=emit_convolutions(self.target, missing), optimize=False)

    def recurrence(self, name: str) -> int:
        """Return the address of a kernel of recurrent layers, which is compiled at the first call.

        Args:
            name: one of `recurrence_names`.
        """
        with self._lock:
            if name not in self._convolutions:
                self._add([name], text=emit_convolutions(self.target, (), [name]))
        return self._convolutions[name]

    def add_object(self, names: Sequence[str], data: bytes) -> None:
        """Add the kernels of an object file that are missing."""
        with self._lock:
            if any(name not in self._convolutions for name in names):
                self._add(names, data=data)

    def _add(
        self,
        names: Sequence[str],
        *,
        text: str | None = None,
        data: bytes | None = None,
        optimize: bool = True,
    ) -> None:
        """Add the kernels of LLVM IR, or of an object file."""
        binding = llvm()
        machine = self.target.machine()
        if data is None:
            assert text is not None
            module = _optimized(text, machine) if optimize else binding.parse_assembly(text)
            data = bytes(machine.emit_object(module))
        engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
        engine.add_object_file(binding.ObjectFileRef.from_data(data))
        engine.finalize_object()
        self.objects.append((tuple(names), data))
        self._engines.append(engine)
        for name in names:
            self._convolutions[name] = engine.get_function_address(name)


_base: list[bytes] = []  # the object file of the base functions, if a file has it


@functools.cache
def _library() -> KernelLibrary:
    return KernelLibrary(host(), [((), _base[0])] if _base else None)


_compiling = threading.Lock()


def fingerprint() -> str:
    """Return a text that identifies the functions of this version, on this processor.

    Object files of other functions must not be used. The source is read instead of emitting the
    functions, which takes much longer.

    Example:
        >>> len(fingerprint())
        64
    """
    found = hashlib.sha256(repr((host().widths, bool(openmp()))).encode())
    files = [f for f in resources.files(__package__).iterdir() if f.name.endswith(".py")]
    if files:
        for file in sorted(files, key=lambda file: file.name):
            found.update(file.read_text("utf-8").encode())  # line ends are \n on every system
    else:  # an application without source files
        found.update(emit_module(host(), team=bool(openmp())).encode())
        found.update(emit_convolutions(host(), (), recurrence_names()).encode())
    return found.hexdigest()


def add_objects(base: bytes, names: Sequence[str], data: bytes) -> None:
    """Add convolution kernels of an object file, and use its base functions if there are none yet.

    Args:
        base: object file of the base functions, see `KernelLibrary.base`.
        names: names of the kernels.
        data: object file of the kernels.

    Example:
        >>> kernels = library()
        >>> add_objects(kernels.base, [], b"")
    """
    with _compiling:
        _base[:] = [base]
        found = _library()
    found.add_object(names, data)


def library() -> KernelLibrary:
    """Return the functions, which are compiled when they are needed.

    Raises:
        RuntimeMissingError: llvmlite is not installed.

    Example:
        >>> library() is library()
        True
    """
    with _compiling:  # two threads must not compile: addresses live as long as their library
        return _library()
