"""The host processor as an LLVM target, and the OpenMP library of PyTorch."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...errors import install_hint
from ..errors import RuntimeMissingError

X86 = platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def llvm() -> ModuleType:
    """Return `llvmlite.binding`, initialized for the host.

    Raises:
        RuntimeMissingError: llvmlite is not installed.
    """
    try:
        import llvmlite.binding as binding
    except ImportError:
        raise RuntimeMissingError(
            f"compile_sparse requires llvmlite, which is not installed. {install_hint('runtime')}"
        ) from None
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    binding.initialize_native_asmparser()
    return binding


def machine() -> Any:
    """Return a new LLVM target machine for the host.

    An MCJIT engine takes ownership of its target machine, so each engine needs a new one.
    """
    binding = llvm()
    features = binding.get_host_cpu_features().flatten()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        # LLVM would split vectors of 512 bits into halves on some processors.
        features=features + ",-prefer-256-bit" * X86,
        opt=3,
    )


@functools.cache
def vector_widths() -> tuple[int, ...]:
    """Return the vector widths of the host in float32 values, widest first."""
    features = llvm().get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 8
    return (8,) if features.get("avx2") else (4,)


@functools.cache
def openmp() -> dict[str, int]:
    """Return the addresses of OpenMP functions in the library that PyTorch itself calls.

    The process may have loaded other OpenMP libraries, whose threads are not PyTorch's.

    Returns:
        Addresses by name; empty if PyTorch calls no OpenMP library with these functions.
    """
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        loaded = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return {name: ctypes.cast(loaded[name], ctypes.c_void_p).value or 0 for name in names}
    except (OSError, AttributeError):  # another system, or a build without OpenMP
        return {}
