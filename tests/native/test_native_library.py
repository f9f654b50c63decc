"""Native libraries on the host: they compute what PyTorch computes, and keep their interface."""

import ctypes
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from native_cases import (
    PACKAGE,
    TOLERANCE,
    compile_and_run,
    error,
    library,
    needs_gcc,
    pruned,
    runtime,
)  # fmt: skip
from torch import nn

import torch_feather as feather
from torch_feather.native import NativeExportError

pytestmark = needs_gcc

ALLOCATING = ("malloc", "calloc", "realloc", "aligned_alloc", "posix_memalign")
ALLOCATIONS = """
#include <stdio.h>
#include <stdlib.h>
#include "model.h"

static int count;
void *__real_malloc(size_t), *__real_calloc(size_t, size_t), *__real_realloc(void *, size_t);
void *__real_aligned_alloc(size_t, size_t);
int __real_posix_memalign(void **, size_t, size_t);
void *__wrap_malloc(size_t n) { count++; return __real_malloc(n); }
void *__wrap_calloc(size_t n, size_t size) { count++; return __real_calloc(n, size); }
void *__wrap_realloc(void *p, size_t n) { count++; return __real_realloc(p, n); }
void *__wrap_aligned_alloc(size_t a, size_t n) { count++; return __real_aligned_alloc(a, n); }
int __wrap_posix_memalign(void **p, size_t a, size_t n)
{ count++; return __real_posix_memalign(p, a, n); }

static float image[MODEL_INPUT_0_SIZE], logits[MODEL_OUTPUT_0_SIZE];

int main(void)
{
    const float *inputs[] = {image};
    float *outputs[] = {logits};
    model *network;
    int created;
    if (model_create(&network, 1) != MODEL_OK) return 1;
    created = count;
    for (int i = 0; i < 3; i++)
        if (model_run(network, inputs, outputs) != MODEL_OK) return 1;
    printf("%d %d", created, count - created);
    return 0;
}
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The network of `feather train` on digits, exported."""
    folder = tmp_path_factory.mktemp("digits")
    model = pruned(feather.models.create("resnet20", num_classes=10, in_channels=1))
    feather.export_native(model, torch.zeros(1, 1, 8, 8), folder)
    return model, folder


def test_the_digits_network_on_new_inputs(digits):
    model, folder = digits
    compiled = library(folder)
    for seed in range(3):
        x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed + 7))
        with torch.no_grad():
            assert error(compiled(x.numpy()), model(x)) < TOLERANCE


def test_the_examples_compile_without_warnings_and_agree(digits):
    _, folder = digits
    strict = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
    out = compile_and_run(folder, ["gcc", "-std=c99", *strict], "example.c", "model.o")
    assert out.startswith("input_0 -> output_0")
    if shutil.which("g++"):
        out = compile_and_run(folder, ["g++", *strict], "example.cpp", "model.o")
        assert len(out.split()) == 10


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.slow
def test_cmake_builds_and_runs_the_examples(digits, tmp_path):
    _, folder = digits
    for command in (
        ["cmake", "-S", folder, "-B", tmp_path],
        ["cmake", "--build", tmp_path],
        ["ctest", "--test-dir", tmp_path, "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_descriptions_of_tensors(digits):
    compiled = library(digits[1])
    assert compiled.inputs == [runtime.Tensor("input_0", (1, 1, 8, 8))]
    assert compiled.outputs == [runtime.Tensor("output_0", (1, 10))]
    header = (digits[1] / "model.h").read_text()
    assert "#define MODEL_INPUT_0_SIZE 64 /* 1 x 1 x 8 x 8 */" in header


def test_errors_are_codes(digits):
    found = ctypes.CDLL(str(digits[1] / "libmodel.so"))
    handle = ctypes.c_void_p()
    for concurrent in (0, -1, 4097):
        assert found.model_create(ctypes.byref(handle), concurrent) == 1
        assert not handle
    assert found.model_create(None, 1) == 1
    assert found.model_create(ctypes.byref(handle), 1) == 0
    x, y = np.zeros(64, np.float32), np.zeros(10, np.float32)
    inputs, outputs = ((ctypes.c_void_p * 1)(a.ctypes.data) for a in (x, y))
    nothing = (ctypes.c_void_p * 1)(None)
    assert found.model_run(handle, inputs, outputs) == 0
    for wrong in ((None, inputs, outputs), (handle, None, outputs), (handle, inputs, None)):
        assert found.model_run(*wrong) == 1
    assert found.model_run(handle, nothing, outputs) == 1
    assert found.model_run(handle, inputs, nothing) == 1
    found.model_destroy(handle)
    found.model_destroy(None)


def test_more_calls_than_places_are_busy(digits):
    """The flag of the only place is set, as if another thread were computing."""
    found = ctypes.CDLL(str(digits[1] / "libmodel.so"))
    handle = ctypes.c_void_p()
    assert found.model_create(ctypes.byref(handle), 1) == 0
    x, y = np.zeros(64, np.float32), np.zeros(10, np.float32)
    call = handle, *((ctypes.c_void_p * 1)(a.ctypes.data) for a in (x, y))
    first_slot = ctypes.c_int64.from_address(handle.value + 16).value
    flag = ctypes.c_int32.from_address(handle.value + first_slot)
    flag.value = 1
    assert found.model_run(*call) == 3
    flag.value = 0
    assert found.model_run(*call) == 0
    assert flag.value == 0
    found.model_destroy(handle)


def test_run_allocates_nothing(digits, tmp_path):
    """The linker replaces the functions that allocate; `create` shows that calls are counted."""
    _, folder = digits
    for file in ("model.h", "model.o"):
        shutil.copy(folder / file, tmp_path)
    (tmp_path / "allocations.c").write_text(ALLOCATIONS)
    wrapped = [f"-Wl,--wrap={name}" for name in ALLOCATING]
    out = compile_and_run(tmp_path, ["gcc", *wrapped], "allocations.c", "model.o")
    created, ran = map(int, out.split())
    assert created == 1
    assert ran == 0


def test_threads_compute_at_the_same_time(digits):
    _, folder = digits
    shared = runtime.load(folder / "libmodel.so", concurrent=4)
    xs = np.random.default_rng(0).normal(size=(4, 1, 1, 8, 8)).astype(np.float32)
    expected = [library(folder)(x) for x in xs]
    wrong = []

    def work(i):
        for _ in range(200):
            if not np.array_equal(shared(xs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_loader_checks_its_arguments(digits):
    _, folder = digits
    compiled = library(folder)
    with pytest.raises(ValueError, match=r"expected \(1, 1, 8, 8\), got \(8, 8\)"):
        compiled(np.zeros((8, 8), np.float32))
    with pytest.raises(ValueError, match=r"1 input\(s\), got 2"):
        compiled(np.zeros(1), np.zeros(1))
    with pytest.raises(ValueError, match="no network 'other'"):
        runtime.load(folder / "libmodel.so", "other")
    with pytest.raises(ValueError, match="concurrent"):
        runtime.load(folder / "libmodel.so", concurrent=0)
    compiled.close()
    compiled.close()
    with pytest.raises(ValueError, match="closed"):
        compiled(np.zeros((1, 1, 8, 8)))


def test_the_loader_needs_numpy_alone(digits):
    """A fresh interpreter that cannot import PyTorch."""
    code = (
        f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {str(PACKAGE)!r})\n"
        "import numpy as np, torch_feather_runtime as runtime\n"
        "model = runtime.load('libmodel.so')\n"
        "x = np.fromfile('example_input.bin', np.float32).reshape(model.inputs[0].shape)\n"
        "y = np.fromfile('example_output.bin', np.float32).reshape(model.outputs[0].shape)\n"
        "assert abs(model(x) - y).max() <= 1e-5 * abs(y).max()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=digits[1], check=True)


def test_several_outputs_and_samples(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 7), nn.Linear(7, 3)

        def forward(self, x):
            y = self.first(x).relu()
            return y, {"second": self.second(y)}

    model = pruned(Two(), 0.5)
    feather.export_native(model, torch.zeros(5, 12), tmp_path, name="two")
    x = torch.randn(5, 12)
    first, second = library(tmp_path, "two")(x.numpy())
    with torch.no_grad():
        y, more = model(x)
    assert error(first, y) < TOLERANCE
    assert error(second, more["second"]) < TOLERANCE


def test_two_libraries_in_one_program(tmp_path):
    """Only the functions of the interface are visible, so other names cannot collide."""
    model = pruned(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()), 0.5)
    for name in ("first", "second"):
        feather.export_native(model, torch.zeros(1, 1, 5, 5), tmp_path, name=name)
    (tmp_path / "both.c").write_text(
        '#include "first.h"\n#include "second.h"\n'
        "int main(void) { first *a; second *b; return first_create(&a, 1) + second_create(&b, 1); }"
    )
    compile_and_run(tmp_path, ["gcc"], "both.c", "first.o", "second.o")
    symbols = subprocess.check_output(["nm", "-g", "--defined-only", tmp_path / "first.o"])
    names = {line.split()[-1].decode() for line in symbols.splitlines()}
    functions = ("create", "run", "destroy", "input", "output")
    assert names == {f"first_{function}" for function in functions}


def test_an_unsupported_operation_is_named(tmp_path):
    class Sorted(nn.Module):
        def forward(self, x):
            return torch.sort(x)[0]

    with pytest.raises(NativeExportError, match=r"do not support sort.*--format onnx"):
        feather.export_native(Sorted(), torch.zeros(1, 4), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "aarch"}, "unknown target 'aarch'; did you mean 'aarch64'"),
        ({"name": "My-Net"}, "C identifier"),
        ({"name": "int"}, "C identifier"),
        ({"example_input": torch.zeros(1, 4, dtype=torch.float64)}, "float32"),
        ({"model": nn.Linear(4, 2).half()}, "weight of torch.float16"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    given = {"model": nn.Linear(4, 2), "example_input": torch.zeros(1, 4), "directory": tmp_path}
    with pytest.raises(feather.ConfigurationError, match=message):
        feather.export_native(**(given | arguments))
    assert not list(tmp_path.iterdir())


def test_the_model_is_unchanged(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    feather.export_native(model, torch.zeros(2, 4), tmp_path)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
