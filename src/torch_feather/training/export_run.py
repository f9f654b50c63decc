"""Export of a trained network: from a run directory to files for its users."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..errors import ConfigurationError
from ..export import SparseFile, export_onnx, hub, save_sparse
from ..files import replace_file
from ..native import c_sizes, export_c, export_native, export_web
from .checkpoint import RunDirectory
from .config import to_dict, to_yaml
from .data import load_dataset
from .network_info import network_info, without_local_paths
from .weights import read_finished, read_weights

FORMATS = {
    "sparse": hub.FILE,
    "safetensors": "model.safetensors",
    "onnx": "model.onnx",
    "onnx-sparse": "model.sparse.onnx",
    "native": "native",  # a folder
    "c": "c",
    "web": "web",
}


# long: half of it is documentation, and one branch for each format
def export_run(
    run: RunDirectory,
    format: str = "sparse",
    out: Path | None = None,
    dtype: torch.dtype | None = None,
    data_path: str | None = None,
    target: str | None = None,
    compare: Path | None = None,
) -> Path:
    """Write the network of a completed run to a file, or to a folder.

    Args:
        run: run directory.
        format: `sparse`; `safetensors` (plain keys, all zeros stored); `onnx`; `onnx-sparse` (for
            ONNX Runtime, see `export_onnx`); or, as folders, `native` (a library, see
            `export_native`), `c` (C99, see `export_c`) and `web` (a page, see `export_web`).
        out: the file or folder. [default: one in the run directory, see FORMATS]
        dtype: type of the values in a sparse file, see `save_sparse`.
        data_path: path of the data. Only needed for ONNX files, libraries and C files of early
            runs, whose report lacks the input shape.
        target: processor of a native library, see `export_native`. [default: the host]
        compare: folder of onnxruntime-web, see `export_web`.

    Returns:
        The file or folder.

    Raises:
        ConfigurationError: the format is unknown, or does not support `dtype`, `target` or
            `compare`; or a page cannot prepare the images as the data set does.
        RunError: the run is not complete, or cannot be read.
        NativeExportError: a native library does not support an operation of the network.

    Example:
        >>> import tempfile
        >>> from .checkpoint import write_json
        >>> from .config import Config
        >>> from .schemas import example_results
        >>> run = RunDirectory(tempfile.mkdtemp())
        >>> run.write_config(Config(network="resnet8"))
        >>> run.save_model(models.create("resnet8", num_classes=10, in_channels=1))
        >>> write_json(run.report_file, example_results())
        >>> export_run(run, format="safetensors", out=run.path / "dense.safetensors").name
        'dense.safetensors'
    """
    if format not in FORMATS:
        raise ConfigurationError(f"format {format!r} is not one of {', '.join(FORMATS)}.")
    if dtype is not None and format != "sparse":
        raise ConfigurationError("dtype is supported for the sparse format only.")
    if target is not None and format != "native":
        raise ConfigurationError("target is supported for the native format only.")
    if compare is not None and format != "web":
        raise ConfigurationError("compare is supported for the web format only.")
    path = out or run.path / FORMATS[format]
    run.read_report()  # raises RunError if the run is not complete
    if format == "sparse":
        tensors = read_weights(run.path).tensors
        metadata, prunable = run_metadata(run), run.prunable()
        save_sparse(tensors, path, dtype=dtype, metadata=metadata, prunable=prunable)
    elif format in ("onnx", "onnx-sparse"):
        network, example = load_network(run, data_path)
        sparse = format == "onnx-sparse"
        export_onnx(network, example, path, _onnx_metadata(run), sparse_initializers=sparse)
    elif format == "native":
        export_native(*load_network(run, data_path), path, target or "host")
    elif format == "c":
        export_c(*load_network(run, data_path), path)
    elif format == "web":
        _export_web(run, path, compare)
    elif path.resolve() != run.model_file.resolve():
        read_weights(run.path)  # raises RunError if the file is damaged
        with open(run.model_file, "rb") as file:
            replace_file(path, lambda new: shutil.copyfileobj(file, new))
    return path


def _export_web(run: RunDirectory, path: Path, compare: Path | None) -> None:
    config, results = read_finished(run)
    info = network_info(config, results, run.path)
    if info.prepared_by is not None:
        raise ConfigurationError(
            f"{run.path}: its images were prepared by the data set {info.prepared_by}, which a "
            "page cannot repeat. Call torch_feather.export_web with mean, std and side of images."
        )
    export_web(
        *load_network(run),
        path,
        class_names=info.class_names,
        mean=info.mean,
        std=info.std,
        side=info.side,
        multi_label=info.multi_label,
        title=f"{results.get('data', config.data.name)}: {config.network}",
        compare=compare,
    )


def _onnx_metadata(run: RunDirectory) -> dict[str, str]:
    """Return what programs without this package need as texts of their own: names and pixels."""
    config, results = read_finished(run)
    if "input_shape" not in results:
        return {}
    info = network_info(config, results, run.path)
    keys = ("class_names", "preprocessing")
    return info.metadata() | {key: json.dumps(info.entries()[key]) for key in keys}


def load_network(run: RunDirectory, data_path: str | None = None) -> tuple[nn.Module, Tensor]:
    """Load the network of a completed run.

    Args:
        run: run directory.
        data_path: path of the data, see `export_run`.

    Returns:
        The network, and an input of zeros (1, ...).

    Raises:
        RunError: the run is not complete, or cannot be read.

    Example:
        >>> import tempfile
        >>> from .checkpoint import write_json
        >>> from .config import Config
        >>> from .schemas import example_results
        >>> run = RunDirectory(tempfile.mkdtemp())
        >>> run.write_config(Config(network="resnet8"))
        >>> run.save_model(models.create("resnet8", num_classes=10, in_channels=1))
        >>> write_json(run.report_file, example_results())
        >>> network, example = load_network(run)
        >>> network(example).shape
        torch.Size([1, 10])
    """
    config, results = read_finished(run)
    if "input_shape" in results:
        shape, classes = results["input_shape"], results["classes"]
    else:
        source = replace(config.data, path=data_path or config.data.path)
        data = load_dataset(source, config.seed)
        shape, classes = list(data.example().shape[1:]), data.classes
    is_text = len(shape) == 1
    model = models.create(config.network, classes, 1 if is_text else shape[0])
    run.load_model(model)
    return model, torch.zeros(1, *shape, dtype=torch.int64 if is_text else None)


def run_metadata(run: RunDirectory) -> dict[str, Any]:
    """Return the metadata of a sparse file: network, data, accuracy, counts and configuration.

    Args:
        run: directory of a completed run.

    Raises:
        RunError: the run is not complete, or cannot be read.

    Example:
        >>> import tempfile
        >>> from .checkpoint import write_json
        >>> from .config import Config
        >>> from .schemas import example_results
        >>> run = RunDirectory(tempfile.mkdtemp())
        >>> run.write_config(Config(init="/home/me/runs/a"))
        >>> write_json(run.report_file, example_results(network="resnet20", weights=8, zeros=4))
        >>> metadata = run_metadata(run)
        >>> metadata["data"], metadata["zeros"], metadata["config"]["init"]  # no local paths
        ('digits', 4, 'a')
    """
    config, results = read_finished(run)
    keys = ("network", "data", "classes", "method", "test_accuracy", "macs")
    metadata = {key: results[key] for key in keys if key in results}
    if "input_shape" in results:
        metadata |= network_info(config, results, run.path).entries()
    return metadata | {
        "weights": results["report"]["weights"],
        "zeros": results["report"]["zeros"],
        "config": to_dict(without_local_paths(config)),
    }


def describe(run: RunDirectory, path: Path, format: str) -> str:
    """Return one line about the size and contents of a file.

    Args:
        run: run directory.
        path: file that `export_run` wrote.
        format: its format.

    Example:
        >>> import tempfile
        >>> run = RunDirectory(tempfile.mkdtemp())
        >>> run.save_model(nn.Linear(2, 2))
        >>> describe(run, run.model_file, "safetensors")
        '... bytes, all zeros stored'
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        text = ", ".join(
            f"{file.relative_to(path)} ({file.stat().st_size:,} bytes)" for file in files
        )
        if format != "c":
            return text
        workspace, constants = c_sizes(path)
        return f"{text}; RAM: {workspace:,} bytes; flash: {constants:,} bytes of constants"
    size = path.stat().st_size
    if format == "onnx-sparse":
        return f"{size:,} bytes; tensors of mostly zeros as sparse initializers"
    if format != "sparse":
        return f"{size:,} bytes, all zeros stored"
    with SparseFile(path) as file:
        entries = {entry.name: entry for entry in file.entries.values()}.values()
    dense = run.model_file.stat().st_size
    layouts = []
    for layout in ("gaps", "dense"):
        sizes = [entry.bytes for entry in entries if entry.layout == layout]
        layouts.append(f"{len(sizes)} as {layout} ({sum(sizes):,} bytes)")
    return (
        f"{size:,} bytes, 1/{dense / size:.1f} of the dense file ({dense:,}); tensors stored "
        f"{' and '.join(layouts)}; {100 * file.sparsity:.2f}% of the weights are zero"
    )


def push(run: RunDirectory, path: Path, repository: str) -> str:
    """Upload a sparse file to the Hugging Face hub, with a model card and config.yaml.

    Args:
        run: run directory.
        path: the sparse file.
        repository: `USER/NAME`. It is created if it does not exist, and is public unless the
            default of the account is different.

    Returns:
        The address, for `load_sparse`.

    Raises:
        ImportError: huggingface_hub is not installed.

    Example:
        >>> import tempfile
        >>> from unittest import mock
        >>> from .checkpoint import write_json
        >>> from .config import Config
        >>> from .schemas import example_results
        >>> run = RunDirectory(tempfile.mkdtemp())
        >>> run.write_config(Config())
        >>> model = nn.Linear(100, 100)
        >>> _ = nn.init.eye_(model.weight)
        >>> run.save_model(model)
        >>> write_json(run.report_file, example_results(network="resnet20"))
        >>> def upload(folder, repository):  # instead of hub.upload
        ...     print(sorted(file.name for file in folder.iterdir()))
        ...     return f"hf://{repository}"
        >>> with mock.patch.object(hub, "upload", upload):
        ...     push(run, export_run(run), "user/digits")
        ['README.md', 'config.yaml', 'model.sparse.safetensors']
        'hf://user/digits'
    """
    with TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / hub.FILE)
        config = to_yaml(without_local_paths(run.read_config()))
        (Path(folder) / "config.yaml").write_text(config)
        layers = run.read_report()["report"]["layers"]
        about = describe(run, path, "sparse")
        card = hub.model_card(repository, run_metadata(run), about, layers)
        (Path(folder) / "README.md").write_text(card)
        return hub.upload(Path(folder), repository)
