"""Exported networks on other processors, in emulators. Skipped where the tools are missing.

Debian has all tools but zig: qemu-user-static, qemu-system-arm, gcc-aarch64-linux-gnu,
gcc-riscv64-linux-gnu, gcc-arm-none-eabi, libnewlib-arm-none-eabi, nodejs; `pip install ziglang`.
"""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from native_cases import compile_and_run, needs_gcc, pruned

import torch_feather as feather
from torch_feather.native import export, targets

HERE = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
NETWORKS = {
    "digits": ("resnet20", (1, 1, 8, 8), {}),
    "resnet": ("timm/resnet10t", (1, 3, 32, 32), {}),
    "mobilenet_v1": ("mobilenet_v1", (1, 3, 32, 32), {}),
    "densenet": ("densenet40_24", (1, 3, 16, 16), {}),
    "mobilenet_v3": ("timm/mobilenetv3_small_050", (1, 3, 64, 64), {}),
    "efficientnet": ("timm/efficientnet_lite0", (1, 3, 32, 32), {}),
    "ghostnet": ("timm/ghostnet_050", (1, 3, 32, 32), {}),
    "regnet": ("timm/regnety_002", (1, 3, 32, 32), {}),
    "convnext": ("timm/convnext_atto", (1, 3, 32, 32), {}),
    "deit": ("timm/deit_tiny_patch16_224", (1, 3, 64, 64), {"depth": 2, "img_size": 64}),
}
prepared = {}  # capture takes most of the time: once per network, for all targets


@pytest.fixture
def network(request, monkeypatch):
    """Return an exporter of a network that is captured once."""
    name, shape, options = NETWORKS[request.param]
    if name.startswith("timm/"):
        pytest.importorskip("timm")
        model = feather.models.create_timm(name, num_classes=10, in_chans=shape[1], **options)
    else:
        model = feather.models.create(name, num_classes=10, in_channels=shape[1])
    if request.param not in prepared:
        torch.manual_seed(0)
        prepared[request.param] = export.prepare(pruned(model, 0.9), torch.zeros(shape))
    monkeypatch.setattr(export, "prepare", lambda *_: prepared[request.param])
    return lambda folder, target: feather.export_native(model, torch.zeros(shape), folder, target)


def runner(target):
    """Return the compiler and the emulator of a target; skip if one is missing."""
    if target in ("host", "x86-64-v3", "x86-64-v4"):
        if shutil.which("gcc") is None or (target != "host" and not X86):
            pytest.skip("needs gcc on an x86")
        for flag in {"x86-64-v3": ["avx2"], "x86-64-v4": ["avx512vl"]}.get(target, []):
            if flag not in CPU:
                pytest.skip(f"needs {flag}")
        return ["gcc"], []
    emulator = shutil.which("node" if target == "wasm32" else f"qemu-{target}-static")
    if emulator is None:
        pytest.skip("needs an emulator")
    if target != "wasm32" and (gcc := shutil.which(f"{target}-linux-gnu-gcc")):
        return [gcc, "-static"], [emulator]
    if (zig := targets.find_zig()) is None:
        pytest.skip("needs a cross compiler")
    system = "wasi" if target == "wasm32" else "linux-musl"
    return [*zig, "cc", "-target", f"{target}-{system}"], [emulator]


def run_example(folder, target):
    command, emulator = runner(target)
    if target == "wasm32":
        emulator = [*emulator, "--no-warnings", str(HERE / "wasi.mjs")]
        result = subprocess.run(
            [*command, "-msimd128", "example.c", "model.o", "-o", "example.wasm", "-lm"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        files = ["/example_input.bin", "/example_output.bin"]
        program = [*emulator, "example.wasm", ".", *files]
        done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    return compile_and_run(folder, command, "example.c", "model.o", run=emulator)


TARGETS = ("host", *targets.TARGETS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("network", ["digits"], indirect=True)
def test_the_digits_network(network, target, tmp_path):
    runner(target)
    network(tmp_path, target)
    assert "largest difference" in run_example(tmp_path, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "digits"], indirect=True)
def test_networks(network, target, tmp_path):
    runner(target)
    network(tmp_path, target)
    assert "largest difference" in run_example(tmp_path, target)


@pytest.mark.parametrize("target", ["aarch64", "riscv64", "x86-64-v3"])
def test_shared_libraries(target, tmp_path):
    """They are linked if a compiler for the target is found."""
    model = pruned(torch.nn.Linear(8, 4), 0.5)
    files = feather.export_native(model, torch.zeros(1, 8), tmp_path, target)
    found = tmp_path / "libmodel.so" in files
    assert found == (targets.compiler(target) is not None)
    if found:
        machine = {"aarch64": 183, "riscv64": 243, "x86-64-v3": 62}[target]
        header = (tmp_path / "libmodel.so").read_bytes()[:20]
        assert int.from_bytes(header[18:20], "little") == machine


@needs_gcc
def test_the_digits_network_in_c99(tmp_path):
    model = pruned(feather.models.create("resnet20", num_classes=10, in_channels=1))
    feather.export_c(model, torch.zeros(1, 1, 8, 8), tmp_path)
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2"]
    out = compile_and_run(tmp_path, ["gcc", *strict], "example.c", "model.c")
    workspace, constants = map(int, re.findall(r"(\d+) bytes", out))
    assert (workspace, constants) == feather.native.c_sizes(tmp_path)
    assert workspace <= 40_000


def test_the_digits_network_on_a_cortex_m4(tmp_path, capsys):
    """All memory but the constants fits into 64 KiB, as `cortex_m.ld` states."""
    gcc, emulator = shutil.which("arm-none-eabi-gcc"), shutil.which("qemu-system-arm")
    if gcc is None or emulator is None:
        pytest.skip("needs arm-none-eabi-gcc and qemu-system-arm")
    model = pruned(feather.models.create("resnet20", num_classes=10, in_channels=1))
    feather.export_c(model, torch.zeros(1, 1, 8, 8), tmp_path)
    processor = ["-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"]
    strict = ["-std=c99", "-Wall", "-Werror", "-O2"]
    system = ["--specs=rdimon.specs", "-nostartfiles", "-T", str(HERE / "cortex_m.ld")]
    emulated = [emulator, "-M", "mps2-an386", "-nographic", "-semihosting", "-kernel"]
    start = str(HERE / "cortex_m.c")
    command = [gcc, *processor, *strict, *system]
    out = compile_and_run(tmp_path, command, start, "example.c", "model.c", run=emulated)
    assert "largest difference" in out
    with capsys.disabled():
        print(f"\nCortex-M4: {out.strip()}")
