"""Processors that kernels are generated for: the host or another one; PyTorch's OpenMP library."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ...errors import install_hint
from ..errors import RuntimeMissingError


@functools.cache
def llvm() -> ModuleType:
    """Return `llvmlite.binding`, initialized for all processors that it knows.

    Raises:
        RuntimeMissingError: llvmlite is not installed.

    Example:
        >>> llvm().__name__
        'llvmlite.binding'
    """
    try:
        import llvmlite.binding as binding
    except ImportError:
        raise RuntimeMissingError(
            f"Machine code requires llvmlite, which is not installed. {install_hint('runtime')}"
        ) from None
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    return binding


class Target(NamedTuple):
    """A processor that kernels are generated for.

    Attributes:
        triple: LLVM's name of architecture and system, such as ``"aarch64-linux-gnu"``.
        cpu: LLVM's name of the processor; empty for any processor of the architecture.
        features: its instruction sets in LLVM's notation, such as ``"+avx2,+fma"``.
        widths: float32 values in its vectors, widest first: out of 16, 8 and 4.

    Example:
        >>> Target("aarch64-linux-gnu").widths
        (4,)
    """

    triple: str
    cpu: str = ""
    features: str = ""
    widths: tuple[int, ...] = (4,)

    @property
    def architecture(self) -> str:
        """The first part of the triple."""
        return self.triple.partition("-")[0]

    def machine(self, *, for_files: bool = False) -> Any:
        """Return a new LLVM target machine.

        An MCJIT engine takes ownership of its target machine, so each engine needs a new one.

        Args:
            for_files: whether it writes object files. Their code is position-independent, except
                for browsers, whose modules are alone in their memory.
        """
        known = llvm().Target.from_triple(self.triple)
        reloc = "static" if self.triple == "wasm32-unknown-unknown" else "pic"
        options = {"reloc": reloc, "codemodel": "default"} if for_files else {}
        return known.create_target_machine(cpu=self.cpu, features=self.features, opt=3, **options)


@functools.cache
def host() -> Target:
    """Return the processor of this machine.

    Example:
        >>> from torch_feather.runtime.kernels import library
        >>> library().target == host()
        True
    """
    binding = llvm()
    found = binding.get_host_cpu_features()
    widths = (16, 8) if found.get("avx512f") else (8,) if found.get("avx2") else (4,)
    features = found.flatten()
    if widths[0] == 16:  # LLVM would split these vectors into halves on some processors
        features += ",-prefer-256-bit"
    return Target(binding.get_default_triple(), binding.get_host_cpu_name(), features, widths)


@functools.cache
def openmp() -> dict[str, int]:
    """Return the addresses of OpenMP functions in the library that PyTorch itself calls.

    The process may have loaded other OpenMP libraries, whose threads are not PyTorch's.

    Returns:
        Addresses by name; empty if PyTorch calls no OpenMP library with these functions.

    Example:
        >>> set(openmp()) <= {"GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"}
        True
    """
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        loaded = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return {name: ctypes.cast(loaded[name], ctypes.c_void_p).value or 0 for name in names}
    except (OSError, AttributeError):  # another system, or a build without OpenMP
        return {}
