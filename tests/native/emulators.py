"""Compilers and emulators of other processors, for the tests and for benchmarks/native.py.

Debian has all but zig: qemu-user-static, qemu-system-arm, gcc-aarch64-linux-gnu,
gcc-riscv64-linux-gnu, gcc-arm-none-eabi, libnewlib-arm-none-eabi, nodejs; `pip install ziglang`.
The emulators of qemu-user, other than those of qemu-user-static, can count instructions.
"""

import platform
import shutil
import subprocess
from pathlib import Path

from torch_feather.native import targets

HERE = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
NEEDS = {"x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}  # of the processor
CORTEX_M4 = "cortex-m4"
CORTEX_FLAGS = [
    *("-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"),
    *("-std=c99", "-Wall", "-Werror", "-O2", "--specs=rdimon.specs", "-nostartfiles"),
    *("-T", str(HERE / "cortex_m.ld"), str(HERE / "cortex_m.c")),
]
BOARD = ["-M", "mps2-an386", "-nographic", "-semihosting", "-kernel"]


def compiler(target):
    """Return the command that compiles a program for a target, or None."""
    if target == CORTEX_M4:
        gcc = shutil.which("arm-none-eabi-gcc")
        return gcc and [gcc, *CORTEX_FLAGS]
    if target == "host" or target in NEEDS:
        return ["gcc"] if shutil.which("gcc") and (target == "host" or X86) else None
    if target != "wasm32" and (gcc := shutil.which(f"{target}-linux-gnu-gcc")):
        return [gcc, "-static"]
    if (zig := targets.find_zig()) is None:
        return None
    if target == "wasm32":
        return [*zig, "cc", "-target", "wasm32-wasi", "-msimd128"]
    return [*zig, "cc", "-target", f"{target}-linux-musl"]


def emulator(target):
    """Return the command that runs a program of a target, without the program; or None."""
    if target == CORTEX_M4:
        return (qemu := shutil.which("qemu-system-arm")) and [qemu, *BOARD]
    if target == "wasm32":
        return (node := shutil.which("node")) and [node, "--no-warnings", str(HERE / "wasi.mjs")]
    if target == "host" or target in NEEDS:
        return [] if NEEDS.get(target, "") in CPU else None
    qemu = shutil.which(f"qemu-{target}-static") or shutil.which(f"qemu-{target}")
    return qemu and [qemu]


def available(target):
    """Return whether there are a compiler and an emulator of a target."""
    return compiler(target) is not None and emulator(target) is not None


def run(folder, target, *sources, run=None):
    """Compile sources in their folder for a target, and return the finished process of a run.

    Args:
        folder: of the sources, and of the example's files.
        target: a target of `export_native`, or `CORTEX_M4`.
        sources: names of files, and options.
        run: command that runs the program. [default: the emulator]
    """
    program = "program.wasm" if target == "wasm32" else "./program"
    build = [*compiler(target), *sources, "-o", program, "-lm"]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = [*(emulator(target) if run is None else run), program]
    if target == "wasm32":
        command += [".", "/example_input.bin", "/example_output.bin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done
