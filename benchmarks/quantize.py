"""Quantization to int8 of a sparse network: its accuracy, and whether zeros stay zeros.

The network of each run is quantized after training, by torchao (`prepare_pt2e`, the quantizer for
x86) and by NNCF for OpenVINO. Both calibrate the ranges of activations with 256 training images,
as augmented for training. Weights are counted in the quantized network itself, where batch norms
are part of the convolutions.

    feather train --out runs/digits
    python benchmarks/quantize.py runs/digits --out results/quantize

Packages: pip install torchao nncf openvino
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
    parser.add_argument("runs", type=Path, nargs="+", help="directories of completed runs")
    parser.add_argument("--out", type=Path, help="results: OUT.json and OUT.txt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [{"run": run.name, **row} for run in options.runs for row in measure(RunDirectory(run))]
    command = " ".join(["python benchmarks/quantize.py", *sys.argv[1:]])
    found = {"command": command, **provenance(torch.device("cpu"))}
    text = table(rows)
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
