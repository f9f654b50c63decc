"""Compilation of all kernels, once per process."""

from __future__ import annotations

import ctypes
import functools
import threading

from .convolution import Variant, declare_intrinsics, emit_convolution
from .host import llvm, machine, openmp, vector_widths
from .plane_copy import COLUMN_STRIDES, emit_copy
from .schedule import declare_sleep, emit_run, emit_run_team
from .tiles import tiles


def variants() -> list[Variant]:
    """Return all convolution kernels of this machine."""
    return [
        Variant(tile, combine, residual, mask)
        for tile in tiles()
        for combine, residual in (("fma", False), ("fma", True), ("max", False))
        for mask in (False, True)
        if combine == "fma" or tile.channels == 1
    ]


def emit_module() -> str:
    """Return the LLVM IR of all functions."""
    return "\n".join(
        [
            *("\n".join(declare_intrinsics(w)) for w in vector_widths()),
            "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)",
            declare_sleep(),
            *("\n".join(emit_convolution(variant)) for variant in variants()),
            *("\n".join(emit_copy(stride)) for stride in COLUMN_STRIDES),
            "\n".join(emit_run()),
            *(("\n".join(emit_run_team()),) if openmp() else ()),
        ]
    )


class KernelLibrary:
    """The compiled functions. Use `library()` to get the one of this process.

    Attributes:
        convolutions: addresses by variant.
        copies: addresses by distance between columns of the source, or None for any distance.
        run: function (operations, number of operations, thread, threads, barrier) that releases the
            GIL.
        run_team: function (operations, number of operations, threads, barrier) that calls `run` on
            PyTorch's own OpenMP threads, or None if PyTorch does not use OpenMP. Other threads
            would compete for the cores with PyTorch's, which poll for work for a while after each
            operator.
    """

    def __init__(self) -> None:
        binding = llvm()
        for name, address in openmp().items():
            binding.add_symbol(name, address)
        module = binding.parse_assembly(emit_module())
        module.verify()
        target = machine()
        options = binding.create_pipeline_tuning_options(speed_level=2)
        options.slp_vectorization = options.loop_unrolling = False  # tiles are vectors already
        options.loop_vectorization = True  # for copies
        builder = binding.create_pass_builder(target, options)
        builder.getModulePassManager().run(module, builder)
        self._engine = binding.create_mcjit_compiler(module, target)
        self._engine.finalize_object()
        address_of = self._engine.get_function_address
        self.convolutions = {variant: address_of(variant.name) for variant in variants()}
        self.copies = {stride: address_of(f"copy_{stride}") for stride in COLUMN_STRIDES}
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        run = ctypes.CFUNCTYPE(None, pointer, number, number, number, pointer)
        self.run = run(address_of("run"))
        run_team = ctypes.CFUNCTYPE(None, pointer, number, number, pointer)
        self.run_team = run_team(address_of("run_team")) if openmp() else None


@functools.cache
def _library() -> KernelLibrary:
    return KernelLibrary()


_compiling = threading.Lock()


def library() -> KernelLibrary:
    """Return the functions, compiled on the first call in about one second.

    Raises:
        RuntimeMissingError: llvmlite is not installed.
    """
    with _compiling:  # two threads must not compile: addresses live as long as their library
        return _library()
