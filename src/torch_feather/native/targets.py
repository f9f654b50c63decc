"""Processors that native libraries are written for, and linkers for them."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import ConfigurationError, nearest
from ..runtime.kernels import Target, host
from .errors import NativeExportError

# All but the host run on any processor of the architecture, or of the level that they name.
TARGETS = {
    "x86-64-v3": Target("x86_64-unknown-linux-gnu", "x86-64-v3", "", (8,)),
    "x86-64-v4": Target("x86_64-unknown-linux-gnu", "x86-64-v4", "-prefer-256-bit", (16, 8)),
    "aarch64": Target("aarch64-unknown-linux-gnu", "generic", "+neon", (4,)),
    "riscv64": Target("riscv64-unknown-linux-gnu", "generic-rv64", "+m,+a,+f,+d,+c", (4,)),
    "wasm32": Target("wasm32-unknown-wasi", "generic", "+simd128", (4,)),
}
# The names that zig has for them.
ZIG = {
    "x86-64-v3": "x86_64-linux-gnu",
    "x86-64-v4": "x86_64-linux-gnu",
    "aarch64": "aarch64-linux-gnu",
    "riscv64": "riscv64-linux-gnu",
}


def find_target(name: str) -> Target:
    """Return a target by name: ``"host"``, or a key of `TARGETS`.

    Raises:
        ConfigurationError: there is no such target.

    Example:
        >>> find_target("aarch64").widths
        (4,)
    """
    if name == "host":
        return host()
    if name not in TARGETS:
        known = ("host", *TARGETS)
        raise ConfigurationError(
            f"unknown target {name!r}{nearest(name, known)} Available: {', '.join(known)}."
        )
    return TARGETS[name]


def compiler(target: str) -> list[str] | None:
    """Return the command of a C compiler that links for a target, or None.

    It is the system's compiler or cross compiler; otherwise zig, if it is installed
    (`pip install ziglang`).

    Args:
        target: name of the target.

    Example:
        >>> compiler("wasm32") is None  # a library for WebAssembly is no shared library
        True
    """
    machine = platform.machine().lower()
    if target == "host" or (target.startswith("x86") and machine in ("x86_64", "amd64")):
        for name in ("cc", "gcc", "clang"):
            if (found := shutil.which(name)) is not None:
                return [found]
    if target == "host":
        return [*zig, "cc"] if (zig := find_zig()) else None
    if (found := shutil.which(f"{target}-linux-gnu-gcc")) is not None:
        return [found]
    if target not in ZIG or not (zig := find_zig()):
        return None
    return [*zig, "cc", "-target", ZIG[target]]


def find_zig() -> list[str] | None:
    """Return the command of zig, from the path or from PyPI's `ziglang`; None if there is none.

    Example:
        >>> found = find_zig()
    """
    if (found := shutil.which("zig")) is not None:
        return [found]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang"]
    return None


def link(objects: list[Path], library: Path, target: str) -> bool:
    """Link object files to a shared library, if a compiler is found.

    Args:
        objects: the object files.
        library: the shared library.
        target: name of the target.

    Returns:
        Whether a compiler was found.

    Raises:
        NativeExportError: the compiler failed.

    Example:
        >>> link([], Path("model.wasm"), "wasm32")
        False
    """
    command = compiler(target)
    if command is None:
        return False
    done = subprocess.run(
        [*command, "-shared", "-o", str(library), *map(str, objects), "-lm"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise NativeExportError(f"{' '.join(command)} failed to link {library}: {done.stderr}")
    return True
