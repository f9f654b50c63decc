"""Quantization to int8 of a sparse network: its accuracy, and whether zeros stay zeros.

The network of each run is quantized after training, by torchao (`prepare_pt2e`, the quantizer for
x86) and by NNCF for OpenVINO. Both calibrate the ranges of activations with 256 training images,
as augmented for training. Weights are counted in the quantized network itself, where batch norms
are part of the convolutions.

    feather train --out runs/digits
    python benchmarks/quantize.py runs/digits --out results/quantize

With --files, it measures files of `save_compiled` instead, with weights in each type: their size,
and of the loaded network the accuracy, the share of test images with the same answer as with
float32, and the largest difference of an output over the largest output. --networks adds networks
of timm with random weights, pruned with ERK densities (`inference_zoo.py`), on random images.

    python benchmarks/quantize.py runs/digits --files --networks resnet50 --out results/weight_types

Packages: pip install torchao nncf openvino; with --files none, with --networks timm
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.runtime.saved import CODE
from torch_feather.runtime.steps import Sparse
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.data import eval_loader, load_dataset, train_loader
from torch_feather.training.export_run import load_network
from torch_feather.training.provenance import provenance

CALIBRATION = 256  # images
Arrays = list[np.ndarray]
Quantized = tuple[Callable[[Tensor], Tensor], Arrays]


def by_torchao(model: nn.Module, images: Tensor) -> Quantized:
    """Return a function that computes logits, and the int8 weights."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    batches = ({0: torch.export.Dim.AUTO},)
    graph = torch.export.export(model, (images[:2],), dynamic_shapes=batches).module()
    observed = prepare_pt2e(graph, quantizer)
    observed(images)
    network = convert_pt2e(observed)
    move_exported_model_to_eval(network)
    weights = [
        getattr(network, node.args[0].target).numpy()
        for node in network.graph.nodes
        if "dequantize_per_channel" in str(node.target)
    ]
    return network, weights


def by_nncf(model: nn.Module, images: Tensor) -> Quantized:
    """Return a function that computes logits, and the int8 weights."""
    import nncf
    import openvino

    graph = openvino.convert_model(model, example_input=images[:1])
    data = nncf.Dataset([image[None].numpy() for image in images])
    graph = nncf.quantize(graph, data, subset_size=len(images))
    weights = [
        op.data
        for op in graph.get_ops()
        if op.get_type_name() == "Constant" and op.data.dtype == np.int8 and op.data.ndim > 1
    ]
    compiled = openvino.Core().compile_model(graph, "CPU")
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0]), weights


def accuracy(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Return the share of correct answers."""
    with torch.no_grad():
        return float((network(images).argmax(1) == labels).float().mean())


def counted(originals: Arrays, quantized: Arrays) -> dict[str, int]:
    """Return how many weights are not 0 before and after, and how many changed from 0 and to 0.

    Args:
        originals: the weights in float32.
        quantized: the same in int8, in any order. Layers are found by their shape and by the
            places of their zeros, so that an exchanged layer shows as a change.
    """
    rest, counts = list(quantized), {"before": 0, "after": 0, "from_zero": 0, "to_zero": 0}
    for original in originals:
        alike = [q for q in rest if q.shape == original.shape]
        if not alike:
            raise SystemExit(f"No int8 weight has the shape {original.shape}.")
        found = min(alike, key=lambda q: int(((q != 0) != (original != 0)).sum()))
        rest = [q for q in rest if q is not found]
        counts["before"] += int((original != 0).sum())
        counts["after"] += int((found != 0).sum())
        counts["from_zero"] += int(((found != 0) & (original == 0)).sum())
        counts["to_zero"] += int(((found == 0) & (original != 0)).sum())
    return counts


def measure(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the accuracy and the counts of the network of a run, in float32 and quantized."""
    config = run.read_config()
    model, _ = load_network(run)
    model.eval()
    data, device = load_dataset(config.data, config.seed), torch.device("cpu")

    training = (batch.x for batch in train_loader(data, config, device))
    calibration = torch.cat(list(training))[:CALIBRATION]
    batches = list(eval_loader(data, data.test, config, device))
    test = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    originals = [
        module.weight.detach().numpy()
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    rows = [{"tool": "none (float32)", "accuracy": accuracy(model, *test)}]
    for tool, quantize in (("torchao", by_torchao), ("nncf", by_nncf)):
        network, weights = quantize(copy.deepcopy(model), calibration)
        rows.append(
            {"tool": f"{tool} {version(tool)}", "accuracy": accuracy(network, *test)}
            | counted(originals, weights)
        )
    return rows


def measure_files(
    model: nn.Module, images: Tensor, labels: Tensor | None = None
) -> list[dict[str, Any]]:
    """Return a row for each type of stored weights.

    Args:
        model: in eval mode.
        images: the test images; the network is compiled for one of them.
        labels: their classes; None if the network is not trained.
    """
    network = feather.compile_sparse(model, images[:1], threads=1)
    # With batch norms folded in: weights of channels whose factor is 0 are zeros, too.
    steps = [s for s in network.plan.steps if isinstance(s, Sparse) and not s.layer.pools]
    nonzeros = sum(len(step.taps.values) for step in steps)
    rows, expected = [], torch.cat([network(image[None]) for image in images])
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
            path = Path(folder, "network")
            feather.save_compiled(network, path, dtype=dtype)
            loaded = feather.load_compiled(path)
            found = torch.cat([loaded(image[None]) for image in images])
            row = {
                "weights": str(dtype).removeprefix("torch."),
                "nonzeros": nonzeros,
                "file_bytes": path.stat().st_size,
                "code_bytes": code_bytes(path),
                "error": float((found - expected).abs().max() / expected.abs().max()),
                "same_answers": float((found.argmax(1) == expected.argmax(1)).float().mean()),
                "images": len(images),
            }
            if labels is not None:
                row["accuracy"] = float((found.argmax(1) == labels).float().mean())
            rows.append(row)
    return rows


def code_bytes(path: Path) -> int:
    """Return the bytes of machine code in a file."""
    with safe_open(path, framework="np") as file:
        return sum(file.get_tensor(name).nbytes for name in CODE)


def files_of_run(run: RunDirectory) -> list[dict[str, Any]]:
    """Return a row for each type of stored weights of the network of a run."""
    config = run.read_config()
    model, _ = load_network(run)
    data = load_dataset(config.data, config.seed)
    batches = list(eval_loader(data, data.test, config, torch.device("cpu")))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return measure_files(model.eval(), images, labels)


def files_of_network(name: str, sparsity: float = 0.95) -> list[dict[str, Any]]:
    """Return a row for each type of stored weights of a network with random weights."""
    from inference_zoo import create, pruned

    size = create(name)[1].shape[-1]
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    return measure_files(pruned(name, sparsity)[0], images)


def table_of_files(rows: list[dict[str, Any]]) -> str:
    """Return rows of `measure_files` as text."""
    lines = [
        f"{'network':24} {'weights':9} {'nonzero':>9} {'file, bytes':>12} {'of them code':>13} "
        f"{'largest error':>14} {'same answers':>13} {'accuracy':>9}  images"
    ]
    for row in rows:
        accuracy = f"{100 * row['accuracy']:8.2f}%" if "accuracy" in row else " " * 9
        lines.append(
            f"{row['run']:24} {row['weights']:9} {row['nonzeros']:>9,} {row['file_bytes']:>12,} "
            f"{row['code_bytes']:>13,} {row['error']:>14.1e} {100 * row['same_answers']:12.2f}% "
            f"{accuracy}  {row['images']}"
        )
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    lines = [
        f"{'run':20} {'tool':16} {'accuracy':>9}  nonzero weights: before, after; from 0, to 0"
    ]
    for row in rows:
        counts = "{before:,}, {after:,}; {from_zero}, {to_zero}" if "before" in row else ""
        percent = f"{100 * row['accuracy']:8.2f}%"
        lines.append(f"{row['run']:20} {row['tool']:16} {percent}  {counts.format(**row)}".rstrip())
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="*", help="directories of completed runs")
    parser.add_argument("--files", action="store_true", help="measure files of save_compiled")
    parser.add_argument("--networks", nargs="+", default=[], help="with --files: networks of timm")
    parser.add_argument("--out", type=Path, help="results: OUT.json and OUT.txt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = files_of_run if options.files else measure
    rows = [{"run": run.name, **row} for run in options.runs for row in measured(RunDirectory(run))]
    for name in options.networks:
        rows += [{"run": f"{name}, 95%", **row} for row in files_of_network(name)]
    command = " ".join(["python benchmarks/quantize.py", *sys.argv[1:]])
    found = {"command": command, **provenance(torch.device("cpu"))}
    text = table_of_files(rows) if options.files else table(rows)
    if options.out:
        options.out.with_suffix(".json").write_text(
            json.dumps({**found, "rows": rows}, indent=1) + "\n"
        )
        versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        heading = f"{command}\n{versions}, commit {found['commit']}"
        options.out.with_suffix(".txt").write_text(f"{heading}\n\n{text}")
    print(text, end="")


if __name__ == "__main__":
    main()
