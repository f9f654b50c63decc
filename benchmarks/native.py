"""Exported networks on other processors: errors, sizes, and instructions in emulators.

Networks have 95% zeros with ERK densities and random weights, as in `inference_zoo.py`; those of
digits come from a run of `feather train`, and from `models.create`. Each is exported for each
target, compiled with its own `example.c`, and run: on x86 directly, for AArch64 and RISC-V under
qemu, for WebAssembly in Node, and the networks of digits as C source on an emulated Cortex-M4. For
AVX-512 without a processor that has it, only sizes are recorded. The images have 64 pixels, because
emulators are slow; DeiT has 224.

Errors are the largest difference from PyTorch's output, relative to the largest output.
Instructions are counted by a plugin of qemu (`native_instructions.c`): those of three calls of
`run` less those of one, halved. They are divided by the multiply-adds with nonzero weights, so all
else that a network computes is included. Qemu 7.2 has no AVX-512.

    feather train --out runs/digits
    python benchmarks/native.py --run runs/digits --json results/native.json

Networks that the file has already are not measured again. Tools: see tests/native/emulators.py, and
qemu-user. Targets without tools are skipped. Packages: timm, onnx, onnxruntime, onnxscript.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from inference_zoo import pruned
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.allocation import ERK
from torch_feather.native import c_sizes, export
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.export_run import load_network
from torch_feather.training.provenance import provenance

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/native"))
import emulators  # noqa: E402

SPARSITY = 0.95
AVX512 = "x86-64-v4"
TARGETS = ("x86-64-v3", AVX512, "aarch64", "riscv64", "wasm32")
SIDES = {  # of the images of networks of timm
    "resnet18": 64,
    "resnet50": 64,
    "mobilenetv3_small_100": 64,
    "efficientnet_b0": 64,
    "regnety_004": 64,
    "ghostnet_100": 64,
    "convnext_atto": 64,
    "deit_tiny_patch16_224": 224,
}
DIGITS = ", 8"  # end of the labels of networks for digits, which have 8 × 8 pixels
PACKAGED = "resnet50, 224"  # its files are compared with those of ONNX Runtime
CALLS = """
#include "model.h"
static float image[MODEL_INPUT_0_SIZE], answer[MODEL_OUTPUT_0_SIZE];
"""
CALL_LIBRARY = """
int main(void)
{
    const float *inputs[] = {image};
    float *outputs[] = {answer};
    model *network;
    if (model_create(&network, 1) != MODEL_OK) return 1;
    for (int i = 0; i < CALLS; i++)
        if (model_run(network, inputs, outputs) != MODEL_OK) return 1;
    return 0;
}
"""
CALL_SOURCE = """
static float workspace[MODEL_WORKSPACE + 1];
int main(void)
{
    for (int i = 0; i < CALLS; i++) model_run(workspace, image, answer);
    return 0;
}
"""
IMPORT = """
import time, numpy
begin = time.process_time()
import torch_feather_runtime
print(1e3 * (time.process_time() - begin))
"""


def digits_network(name: str) -> tuple[nn.Module, Tensor]:
    """Return an initialized network of digits with ERK densities, and an input."""
    torch.manual_seed(0)
    model = feather.models.create(name, num_classes=10, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"sparsity": SPARSITY, "total_steps": 1, "schedule": "constant"}
    sparsifier = feather.sparsify(model, optimizer, "hard-ste", allocation=ERK(), **options)
    return sparsifier.finalize().eval(), torch.randn(1, 1, 8, 8)


def networks(run: Path | None) -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    """Return functions that create each network and an input, by label."""
    found: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {}
    if run is not None:
        found["resnet8, trained on digits, 8"] = lambda: load_network(RunDirectory(run))
    found["resnet20, not trained, 8"] = lambda: digits_network("resnet20")
    for name, side in SIDES.items():
        found[f"{name}, {side}"] = lambda name=name, side=side: (
            pruned(name, SPARSITY)[0],
            torch.randn(1, 3, side, side),
        )
    found[PACKAGED] = lambda: (pruned("resnet50", SPARSITY)[0], torch.randn(1, 3, 224, 224))
    return found


def counting_emulator(target: str, plugin: Path) -> list[str] | None:
    """Return the command of an emulator that counts instructions; None if there is none."""
    name = {"x86-64-v3": "qemu-x86_64", emulators.CORTEX_M4: "qemu-system-arm"}
    qemu = shutil.which(name.get(target, f"qemu-{target}"))
    if qemu is None or target in (AVX512, "wasm32"):
        return None
    board = emulators.BOARD if target == emulators.CORTEX_M4 else []
    processor = ["-cpu", "max"] if target == "x86-64-v3" else []
    return [qemu, *processor, "-plugin", str(plugin), *board]


def instructions(folder: Path, target: str, sources: list[str], main: str) -> float | None:
    """Return the instructions of one call of a network; None where they cannot be counted."""
    plugin = folder / "instructions.so"
    command = counting_emulator(target, plugin)
    if command is None:
        return None
    source = Path(__file__).with_name("native_instructions.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", source, "-o", plugin], check=True)
    (folder / "calls.c").write_text(CALLS + main)
    static = ["-static"] if target == "x86-64-v3" else []
    counts = []
    for calls in (1, 3):
        given = ["calls.c", *sources, *static, f"-DCALLS={calls}"]
        done = emulators.run(folder, target, *given, run=command)
        counts.append(int(re.search(r"(\d+) instructions", done.stderr)[1]))
    return (counts[1] - counts[0]) / 2


def difference(text: str) -> float:
    """Return the error that an example printed."""
    return float(re.search(r"largest difference (\S+) of", text)[1])


def measure_library(model: nn.Module, x: Tensor, target: str, macs: int) -> dict[str, Any]:
    """Return the error, sizes and instructions of a network exported for a target.

    The error and the instructions are None if the target cannot be run.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        feather.export_native(model, x, folder, target)
        library, error, count = folder / "libmodel.so", None, None
        if emulators.available(target):
            error = difference(emulators.run(folder, target, "example.c", "model.o").stdout)
            count = instructions(folder, target, ["model.o"], CALL_LIBRARY)
        return {
            "error": error,
            "object_bytes": (folder / "model.o").stat().st_size,
            "library_bytes": library.stat().st_size if library.exists() else None,
            "instructions": count,
            "instructions_per_mac": count and count / macs,
        }


def measure_cortex(model: nn.Module, x: Tensor, macs: int) -> dict[str, Any]:
    """Return the error, memory and instructions of a network as C source on a Cortex-M4."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        feather.export_c(model, x, folder)
        workspace, constants = c_sizes(folder)
        target = emulators.CORTEX_M4
        text = emulators.run(folder, target, "example.c", "model.c").stdout
        sizes = subprocess.check_output(["arm-none-eabi-size", folder / "program"], text=True)
        code, data, bss = map(int, sizes.splitlines()[1].split()[:3])
        count = instructions(folder, target, ["model.c"], CALL_SOURCE)
        return {
            "error": difference(text),
            "workspace_bytes": workspace,
            "constant_bytes": constants,
            "program_flash_bytes": code + data,
            "program_ram_bytes": data + bss,
            "instructions": count,
            "instructions_per_mac": count and count / macs,
        }


def onnx_bytes(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return the sizes of a network as ONNX, and of the library of ONNX Runtime."""
    import onnxruntime

    engine = max(Path(onnxruntime.__file__).parent.rglob("libonnxruntime.so*"))
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(model, (x,), Path(folder) / "model.onnx", dynamo=True, verbose=False)
        files = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {
        "model_bytes": files,
        "engine_bytes": engine.stat().st_size,
        "onnxruntime": onnxruntime.__version__,
    }


def measure(label: str, model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return the row of a network, for all targets whose tools are installed."""
    model.eval()
    macs = feather.count_flops(model, x).sparse
    weights = [p for p in model.parameters() if p.dim() > 1]
    row: dict[str, Any] = {
        "network": label,
        "input": list(x.shape),
        "sparsity": feather.sparsity(model),
        "nonzero_weights": sum(int(w.count_nonzero()) for w in weights),
        "dense_bytes": 4 * sum(w.numel() for w in weights),
        "sparse_macs": macs,
        "targets": {},
    }
    captured = export.prepare(model, x)  # takes most of the time
    with mock.patch.object(export, "prepare", return_value=captured):
        for target in (AVX512,) if label == PACKAGED else TARGETS:
            if target == AVX512 or emulators.available(target):
                row["targets"][target] = measure_library(model, x, target, macs)
        if label.endswith(DIGITS) and emulators.available(emulators.CORTEX_M4):
            row["targets"][emulators.CORTEX_M4] = measure_cortex(model, x, macs)
    if label.endswith(DIGITS) or label == PACKAGED:
        row["onnx"] = onnx_bytes(model, x)
    return row


def measure_runtime() -> dict[str, Any]:
    """Return the size of the wheel of torch-feather-runtime and its import time after NumPy's."""
    package = ROOT / "packages/torch-feather-runtime"
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
        subprocess.run([*pip, package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(wheel)!r}){IMPORT}"]
        times = [float(subprocess.check_output(command)) for _ in range(11)]
        return {"wheel_bytes": wheel.stat().st_size, "import_ms": statistics.median(times)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of all networks as text."""
    lines = [
        "Error; bytes of model.o and libmodel.so; instructions per multiply-add (MAC) with a "
        "nonzero weight.",
        "",
    ]
    for row in rows:
        lines.append(
            f"{row['network']}: {100 * row['sparsity']:.1f}% zeros, {row['sparse_macs']:,} MACs, "
            f"weights {row['nonzero_weights']:,} nonzero, {row['dense_bytes']:,} bytes dense"
        )
        for target, found in row["targets"].items():
            each = found["instructions_per_mac"]
            count = f"{each:6.2f} instructions per MAC" if each else ""
            if target == emulators.CORTEX_M4:
                sizes = (
                    f"RAM {found['workspace_bytes']:,}, flash {found['constant_bytes']:,}; the "
                    f"example {found['program_ram_bytes']:,} and {found['program_flash_bytes']:,}"
                )
            else:
                library = f"{found['library_bytes']:,}" if found["library_bytes"] else "-"
                sizes = f"{found['object_bytes']:>10,} {library:>10}"
            error = "not run" if found["error"] is None else f"{found['error']:.1e}"
            lines.append(f"    {target:10} {error}  {sizes}  {count}".rstrip())
        if "onnx" in row:
            engine = row["onnx"]
            lines.append(
                f"    dense ONNX {engine['model_bytes']:,}, libonnxruntime.so "
                f"{engine['onnxruntime']} {engine['engine_bytes']:,}"
            )
    return "\n".join(lines) + "\n"


def heading(stored: dict[str, Any]) -> str:
    """Return hardware, versions, command and the facts of the runtime package."""
    versions = ", ".join(f"{name} {number}" for name, number in stored["versions"].items())
    commits = ", ".join(dict.fromkeys(row["commit"] for row in stored["rows"]))
    tools = ", ".join(stored["tools"].values())
    wheel = stored["runtime"]
    return (
        f"{stored['hardware']['cpu']}, float32, batch 1\n{versions}, commit {commits}\n"
        f"{tools}\n{stored['command']}\n\ntorch-feather-runtime: wheel {wheel['wheel_bytes']:,} "
        f"bytes, import {wheel['import_ms']:.1f} ms of CPU time after NumPy's (median of 11)\n\n"
    )


def tool_versions() -> dict[str, str]:
    """Return the first line that each tool prints about its version."""
    compilers = ("gcc", "aarch64-linux-gnu-gcc", "riscv64-linux-gnu-gcc", "arm-none-eabi-gcc")
    names = ("qemu-aarch64", "node", *compilers)
    commands = {name: [name, "--version"] for name in names}
    commands["zig"] = [*(emulators.targets.find_zig() or ["zig"]), "version"]
    found = {}
    for name, command in commands.items():
        if shutil.which(command[0]) is not None:
            line = subprocess.check_output(command, text=True).splitlines()[0]
            found[name] = line if name in line else f"{name} {line}"
    return found


def main() -> None:
    """Measure the networks that the file does not have yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="run directory of the digits network")
    parser.add_argument("--networks", nargs="+", help="labels, as in the results [default: all]")
    parser.add_argument("--json", type=Path, default=Path("results/native.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored: dict[str, Any] = {"rows": []}
    if options.json.exists():
        stored = json.loads(options.json.read_text())
    shown = [Path(a).name if a.startswith(("/", "..")) else a for a in sys.argv[1:]]
    stored["command"] = " ".join(["python benchmarks/native.py", *shown])
    stored |= provenance(torch.device("cpu")) | {"tools": tool_versions()}
    stored.setdefault("runtime", measure_runtime())
    rows, builders = stored["rows"], networks(options.run)
    order = {label: i for i, label in enumerate(builders)}
    for label, build in builders.items():
        if any(r["network"] == label for r in rows) or label not in (options.networks or [label]):
            continue
        rows.append(measure(label, *build()) | {"commit": stored["commit"]})
        done = rows[-1:]
        rows.sort(key=lambda row: order.get(row["network"], -1))
        options.json.write_text(json.dumps(stored, indent=1) + "\n")
        options.json.with_suffix(".txt").write_text(heading(stored) + table(rows))
        print(table(done), flush=True)


if __name__ == "__main__":
    main()
