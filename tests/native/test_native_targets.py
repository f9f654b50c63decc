"""Exported networks on other processors, in emulators. Skipped where the tools are missing.

`emulators.py` names the tools.
"""

import re

import emulators
import pytest
import torch
from native_cases import NETWORKS, compile_and_run, create, needs_gcc, pruned

import torch_feather as feather
from torch_feather.native import export, targets

prepared = {}  # capture takes most of the time: once per network, for all targets


@pytest.fixture
def network(request, monkeypatch):
    """Return an exporter of a network that is captured once."""
    model, shape = create(request.param)
    if request.param not in prepared:
        torch.manual_seed(0)
        prepared[request.param] = export.prepare(pruned(model, 0.9), torch.zeros(shape))
    monkeypatch.setattr(export, "prepare", lambda *_: prepared[request.param])
    return lambda folder, target: feather.export_native(model, torch.zeros(shape), folder, target)


def run_example(folder, target):
    return emulators.run(folder, target, "example.c", "model.o").stdout


def require(target):
    """Skip the test if the compiler or the emulator of a target is missing."""
    if not emulators.available(target):
        pytest.skip(f"needs a compiler and an emulator for {target}")


TARGETS = ("host", *targets.TARGETS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("network", ["digits"], indirect=True)
def test_the_digits_network(network, target, tmp_path):
    require(target)
    network(tmp_path, target)
    assert "largest difference" in run_example(tmp_path, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "digits"], indirect=True)
def test_networks(network, target, tmp_path):
    require(target)
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
    require(emulators.CORTEX_M4)
    model = pruned(feather.models.create("resnet20", num_classes=10, in_channels=1))
    feather.export_c(model, torch.zeros(1, 1, 8, 8), tmp_path)
    out = emulators.run(tmp_path, emulators.CORTEX_M4, "example.c", "model.c").stdout
    assert "largest difference" in out
    with capsys.disabled():
        print(f"\nCortex-M4: {out.strip()}")
