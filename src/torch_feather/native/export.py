"""Export of a network as a library without dependencies: `export_native` and `export_c`."""

from __future__ import annotations

import copy
import ctypes
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..files import to_path
from ..prunable import unwrap
from ..runtime.capture import capture
from ..runtime.kernels import compile_object
from ..runtime.tuning import LayerTuning
from ..runtime.tuning_file import load_tuning
from .c_source import CSource, constant_array
from .errors import NativeExportError
from .library_ir import LibraryText
from .lowering import lower
from .operations import SUPPORTED
from .package import check_name, fill
from .program import Program
from .targets import find_target, link

TOLERANCE = 1e-5  # relative to the largest output
NATIVE_FILES = ("model.h", "example.c", "example.cpp", "CMakeLists.txt")


def export_native(
    model: nn.Module,
    example_input: Tensor,
    directory: str | Path,
    target: str = "host",
    *,
    name: str = "model",
    tuning: Mapping[str, LayerTuning] | str | Path | None = None,
) -> list[Path]:
    """Write a network as a native library with a C interface.

    The library needs neither Python, PyTorch nor LLVM. It contains the weights, without zeros. If a
    compiler is found, a shared library is linked; the host's is compared with PyTorch.

    Args:
        model: takes one tensor; computes in float32. It is not changed.
        example_input: (batch, ...), float32. The library accepts inputs of exactly this shape.
        directory: folder of the files; it is created if it does not exist. Files of the same names
            are replaced.
        target: "host", "x86-64-v3", "x86-64-v4", "aarch64", "riscv64" or "wasm32".
        name: prefix of the files and functions.
        tuning: how layers run, from `compile_sparse` (`SparseModule.tuning`, or its file). Only the
            tiles are used. [default: tiles are chosen by an estimate]

    Returns:
        The files; docs/native.md describes them.

    Raises:
        ConfigurationError: the target is unknown, or the name is no C identifier.
        CaptureError: torch.export cannot capture the model.
        NativeExportError: the network has an operation that is not supported, its outputs differ
            from PyTorch's by more than 1e-5 of the largest output, or the linker failed.
        RuntimeMissingError: llvmlite is not installed.
        OSError: a file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
        ...     files = export_native(model, torch.zeros(1, 8), folder, "riscv64")
        ...     "model.h" in [file.name for file in files]
        True
    """
    check_name(name)
    machine = find_target(target)
    known = load_tuning(tuning) if isinstance(tuning, str | Path) else tuning
    program, example, expected = prepare(model, example_input)
    text = LibraryText(program, machine, name, known).module()
    with TemporaryDirectory() as folder:
        made = Path(folder)
        compiled = made / f"{name}.o"
        compiled.write_bytes(compile_object(machine, text))
        for template in NATIVE_FILES:
            file = template.replace("model", name)
            (made / file).write_text(fill(template, program, name))
        _write_example(made, example, expected)
        library = made / f"lib{name}.so"
        if link([compiled], library, target) and target == "host":
            _check(library, name, program, example, expected)
        return install(made, to_path(directory))


def export_c(
    model: nn.Module, example_input: Tensor, directory: str | Path, *, name: str = "model"
) -> list[Path]:
    """Write a network as C99 source, for microcontrollers and any other processor.

    The source has one function. It uses no heap, no threads, and only `math.h` of the C library.
    The weights are constants, without zeros. The caller passes the memory of the activations.

    Args:
        model: takes one tensor; computes in float32. It is not changed.
        example_input: (batch, ...), float32. The function accepts inputs of exactly this shape.
        directory: folder of the files; it is created if it does not exist. Files of the same names
            are replaced.
        name: prefix of the files and functions.

    Returns:
        The files: source, header, and an example with an input and its output in PyTorch.

    Raises:
        ConfigurationError: the name is no C identifier, the example is no batch of float32, or the
            model is not float32.
        CaptureError: torch.export cannot capture the model.
        NativeExportError: the network has an operation that is not supported.
        OSError: a file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = export_c(nn.Linear(8, 4), torch.zeros(1, 8), folder)
        ...     [file.name for file in files]
        ['example.c', 'example_data.h', 'model.c', 'model.h']
    """
    check_name(name)
    program, example, expected = prepare(model, example_input, tiles=False)
    source = CSource(program)
    outputs = range(len(program.outputs))
    with TemporaryDirectory() as folder:
        made = Path(folder)
        (made / f"{name}.c").write_text(source.text(name))
        header = {
            "workspace": program.workspace,
            "constants": source.constant_bytes,
            "signature": source.signature(name),
        }
        (made / f"{name}.h").write_text(fill("model_c.h", program, name, **header))
        buffers = [f"static float output_{i}[{name.upper()}_OUTPUT_{i}_SIZE];" for i in outputs]
        called = {
            "buffers": "\n".join(buffers),
            "arguments": "".join(f", output_{i}" for i in outputs),
        }
        (made / "example.c").write_text(fill("example_c.c", program, name, **called))
        data = [("example_input", example), ("example_output", expected[0])]
        lines = [
            line for key, x in data for line in constant_array("float", key, x.numpy().ravel())
        ]
        (made / "example_data.h").write_text("\n".join(lines))
        return install(made, to_path(directory))


def c_sizes(directory: Path, name: str = "model") -> tuple[int, int]:
    """Return the bytes of the workspace and of the constants of C source that `export_c` wrote.

    Args:
        directory: folder of the files.
        name: prefix of the files.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = export_c(nn.Linear(8, 4), torch.zeros(1, 8), folder)
        ...     c_sizes(Path(folder))
        (896, 180)
    """
    text = (directory / f"{name}.h").read_text()
    found = dict(re.findall(rf"#define {name.upper()}_(\w+) (\d+)", text))
    return 4 * int(found["WORKSPACE"]), int(found["CONSTANT_BYTES"])


def prepare(
    model: nn.Module, example_input: Tensor, tiles: bool = True
) -> tuple[Program, Tensor, list[Tensor]]:
    """Return the program of a network, an input, and the outputs of the model for it.

    Args:
        model: takes one tensor.
        example_input: (batch, ...), float32.
        tiles: whether products of matrices are computed in tiles, see `lowering.Builder`.

    Raises:
        ConfigurationError: the example is no batch of float32, or the model is not float32.
        CaptureError: torch.export cannot capture the model.
        NativeExportError: the network has an operation that is not supported.

    Example:
        >>> program, x, outputs = prepare(nn.Linear(8, 4), torch.zeros(2, 8))
        >>> program.batch, outputs[0].shape
        (2, torch.Size([2, 4]))
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"A module is required, got {type(model).__name__}.")
    batch = isinstance(example_input, Tensor) and example_input.dim() and example_input.numel()
    if not batch or example_input.dtype != torch.float32:
        raise ConfigurationError("The example must be a non-empty batch (batch, ...) of float32.")
    model = copy.deepcopy(unwrap(model)).cpu().eval()
    for parameter, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise ConfigurationError(
                f"Native libraries compute in float32, got {parameter} of {weight.dtype}. Pass "
                "copy.deepcopy(model).float()."
            )
    example = torch.randn(example_input.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        captured = capture(model, example, any_batch=False, decompose=True)
        program = lower(captured.module, SUPPORTED, tiles)
        found = model(example)
    flat = [v for v in torch.utils._pytree.tree_leaves(found) if isinstance(v, Tensor)]
    return program, example, flat


def _write_example(folder: Path, example: Tensor, expected: list[Tensor]) -> None:
    (folder / "example_input.bin").write_bytes(example.numpy().astype("<f4").tobytes())
    result = expected[0].contiguous().numpy().astype("<f4")
    (folder / "example_output.bin").write_bytes(result.tobytes())


def install(made: Path, directory: Path) -> list[Path]:
    """Copy all files of a folder, and of its subfolders, each at once.

    Args:
        made: the folder.
        directory: where to copy them; it is created if it does not exist.

    Returns:
        The copies.

    Example:
        >>> import tempfile
        >>> made, directory = (Path(tempfile.mkdtemp()) for _ in range(2))
        >>> (made / "model.h").write_text("int x;")
        6
        >>> [file.name for file in install(made, directory)]
        ['model.h']
    """
    files = []
    for file in sorted(f for f in made.rglob("*") if f.is_file()):
        files.append(directory / file.relative_to(made))
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        part = files[-1].with_name(f".{file.name}.part")
        shutil.copyfile(file, part)
        part.replace(files[-1])
    return files


def _check(
    path: Path, name: str, program: Program, example: Tensor, expected: list[Tensor]
) -> None:
    """Compare the outputs of the library with PyTorch's."""
    library = ctypes.CDLL(str(path))
    handle = ctypes.c_void_p()
    results = [np.zeros(view.shape, np.float32) for view in program.outputs]
    inputs = (ctypes.c_void_p * 1)(example.data_ptr())
    outputs = (ctypes.c_void_p * len(results))(*(r.ctypes.data for r in results))
    create, run = library[f"{name}_create"], library[f"{name}_run"]
    status = create(ctypes.byref(handle), 1) or run(handle, inputs, outputs)
    destroy = library[f"{name}_destroy"]
    destroy.argtypes, destroy.restype = [ctypes.c_void_p], None
    destroy(handle)
    if status:
        raise NativeExportError(f"The library returned error {status}.")
    for result, output in zip(results, expected, strict=True):
        largest = output.abs().max().clamp_min(1e-12)
        difference = (torch.from_numpy(result) - output).abs().max() / largest
        if not difference <= TOLERANCE:
            raise NativeExportError(
                f"Outputs of the library differ from PyTorch's by {difference:.1e} of the largest. "
                "No file was written."
            )
