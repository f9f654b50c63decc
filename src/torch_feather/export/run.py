"""Files of a trained network: from a run directory to those who use it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..errors import ConfigurationError
from ..files import replace_file
from ..training.checkpoint import RunDirectory
from ..training.config import Config, to_dict, to_yaml
from ..training.data import load_dataset
from ..training.weights import read_weights
from . import hub
from .onnx import export_onnx
from .sparse_file import SparseFile, save_sparse

FORMATS = {"sparse": hub.FILE, "safetensors": "model.safetensors", "onnx": "model.onnx"}


def export_run(
    run: RunDirectory,
    format: str = "sparse",
    out: Path | None = None,
    dtype: torch.dtype | None = None,
    data_path: str | None = None,
) -> Path:
    """Write the network of a finished run in one of `FORMATS`.

    Args:
        run: where it was trained.
        format: `sparse`; `safetensors`, plain keys and all zeros; or `onnx`.
        out: the file; None is the usual one within the run.
        dtype: of the values in a sparse file, see `save_sparse`.
        data_path: where the data is now; only looked at for ONNX, where report.json does not tell
            the size of an image.

    Returns:
        The file.
    """
    if format not in FORMATS:
        raise ConfigurationError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if dtype is not None and format != "sparse":
        raise ConfigurationError("values are converted in the format sparse only")
    path = out or run.path / FORMATS[format]
    run.read_report()  # an unfinished run says so itself
    if format == "sparse":
        save_sparse(read_weights(run.path).tensors, path, dtype=dtype, metadata=about(run))
    elif format == "onnx":
        export_onnx(*load_network(run, data_path), path)
    elif path.resolve() != run.model_file.resolve():
        with open(run.model_file, "rb") as file:
            replace_file(path, lambda new: shutil.copyfileobj(file, new))
    return path


def load_network(run: RunDirectory, data_path: str | None = None) -> tuple[nn.Module, Tensor]:
    """The network of a finished run as it was trained, and one input of zeros."""
    config, results = run.read_config(), run.read_report()
    if "input_shape" in results:
        shape, classes = results["input_shape"], results["classes"]
    else:
        place = replace(config.data, path=data_path or config.data.path)
        data = load_dataset(place, config.seed)
        shape, classes = list(data.example().shape[1:]), data.classes
    model = models.create(config.network, classes, shape[0])
    run.load_model(model)
    return model, torch.zeros(1, *shape)


def about(run: RunDirectory) -> dict[str, Any]:
    """What a sparse file tells of the run that it comes from."""
    results = run.read_report()
    keys = ("network", "data", "classes", "input_shape", "method", "test_accuracy", "macs")
    told = {key: results[key] for key in keys if key in results}
    return told | {
        "weights": results["report"]["weights"],
        "zeros": results["report"]["zeros"],
        "config": to_dict(_for_others(run.read_config())),
    }


def _for_others(config: Config) -> Config:
    """Without places on this machine."""
    teacher = config.distillation.teacher
    if teacher is not None and not teacher.startswith(models.TIMM):
        teacher = Path(teacher).name
    return replace(
        config,
        init=config.init and Path(config.init).name,
        data=replace(config.data, path=None),
        distillation=replace(config.distillation, teacher=teacher),
    )


def describe(run: RunDirectory, path: Path, format: str) -> str:
    """One line: the size of a file and what it holds."""
    size = path.stat().st_size
    if format != "sparse":
        return f"{size:,} bytes, every zero stored"
    with SparseFile(path) as file:
        entries = {entry.name: entry for entry in file.entries.values()}.values()
    dense = run.model_file.stat().st_size
    layouts = []
    for layout in ("gaps", "dense"):
        taken = [entry.bytes for entry in entries if entry.layout == layout]
        layouts.append(f"{len(taken)} as {layout} ({sum(taken):,} bytes)")
    return (
        f"{size:,} bytes, 1/{dense / size:.1f} of the dense file's {dense:,}; tensors stored "
        f"{' and '.join(layouts)}; {100 * file.sparsity:.2f} % of the weights are zero"
    )


def push(run: RunDirectory, path: Path, repository: str) -> str:
    """Put a sparse file of `run` on the Hugging Face hub, with a model card and config.yaml.

    Args:
        run: where the network was trained.
        path: the sparse file.
        repository: `USER/NAME`; it is made if there is none, public unless the account says
            otherwise.

    Returns:
        Its address, as `load_sparse` takes it.
    """
    with TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / hub.FILE)
        (Path(folder) / "config.yaml").write_text(to_yaml(_for_others(run.read_config())))
        card = hub.model_card(repository, about(run), describe(run, path, "sparse"))
        (Path(folder) / "README.md").write_text(card)
        return hub.upload(Path(folder), repository)
