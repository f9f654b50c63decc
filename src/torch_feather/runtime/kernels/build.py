"""Compilation of all kernels, once per process, and for other processors."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterable
from typing import Any

from .convolution import Variant, declare_intrinsics, emit_convolution
from .host import Target, host, llvm, openmp
from .plane_copy import COLUMN_STRIDES, emit_copy
from .schedule import declare_waiting, emit_run, emit_run_team
from .tiles import tiles


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
    return "\n".join(
        [
            *("\n".join(declare_intrinsics(width)) for width in target.widths),
            "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)",
            *declare_waiting(target),
            *("\n".join(emit_convolution(variant)) for variant in convolutions),
            *("\n".join(emit_copy(stride)) for stride in COLUMN_STRIDES),
            "\n".join(emit_run(target)),
            *(("\n".join(emit_run_team()),) if team else ()),
        ]
    )


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
    """Return an object file of LLVM IR. Its code is position-independent.

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
    """Return the module of this LLVM IR, optimized for a target machine."""
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

    Args:
        target: a processor whose code the host can execute.

    Attributes:
        target: the processor.
        tiles: tiles of its convolution kernels.
        convolutions: addresses by variant.
        copies: addresses by distance between columns of the source, or None for any distance.
        run: function (operations, number of operations, thread, threads, barrier) that releases the
            GIL.
        run_team: function (operations, number of operations, threads, barrier) that calls `run` on
            PyTorch's own OpenMP threads, or None if PyTorch does not use OpenMP. Other threads
            would compete for the cores with PyTorch's, which poll for work for a while after each
            operator.

    Example:
        >>> kernels = library()
        >>> set(kernels.convolutions) == set(variants(kernels.target))
        True
    """

    def __init__(self, target: Target) -> None:
        binding = llvm()
        for name, address in openmp().items():
            binding.add_symbol(name, address)
        self.target, self.tiles = target, tiles(target.widths)
        machine = target.machine()
        # Without a data layout, which costs some kernels 1 to 4%.
        module = _optimized(emit_module(target, team=bool(openmp())), machine)
        self._engine = binding.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        address_of = self._engine.get_function_address
        self.convolutions = {variant: address_of(variant.name) for variant in variants(target)}
        self.copies = {stride: address_of(f"copy_{stride}") for stride in COLUMN_STRIDES}
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        run = ctypes.CFUNCTYPE(None, pointer, number, number, number, pointer)
        self.run = run(address_of("run"))
        run_team = ctypes.CFUNCTYPE(None, pointer, number, number, pointer)
        self.run_team = run_team(address_of("run_team")) if openmp() else None


@functools.cache
def _library() -> KernelLibrary:
    return KernelLibrary(host())


_compiling = threading.Lock()


def library() -> KernelLibrary:
    """Return the functions, compiled on the first call in about one second.

    Raises:
        RuntimeMissingError: llvmlite is not installed.

    Example:
        >>> library() is library()
        True
    """
    with _compiling:  # two threads must not compile: addresses live as long as their library
        return _library()
