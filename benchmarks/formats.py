"""Size of a sparse network's file in the formats of other engines, and whether they use the zeros.

Networks have initial weights, pruned by global magnitude, and perturbed norms and biases. Files are
written and inspected, not run. Formats whose package is not installed are left out
(`pip install coremltools executorch onnx onnxscript openvino`).

The column `in file` counts the zeros that a file stores as four zero bytes, relative to the zero
weights. A dense file stores all of them. Sparse files contain a few such bytes too, in positions
and masks. The column `weights` counts the sparse tensors that the format declares. Without any, it
is `dense` if the file has four bytes for each weight and at least 99% of the zeros, and otherwise
`unknown`.

    python benchmarks/formats.py --json results/formats.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from file_size import prune, vary_norms
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.export import SparseFile, export_onnx
from torch_feather.training.provenance import provenance

NETWORKS = {"resnet8": (1, 8, 8), "timm/resnet18": (3, 224, 224)}  # shape of an image
SPARSITIES = (0.9, 0.95, 0.98)

Writer = Callable[[nn.Module, Tensor, Path], int]  # returns the sparse tensors of the file


def zero_words(content: bytes) -> int:
    """Return how many 32-bit zeros fit into the runs of zero bytes, at any alignment."""
    zero = np.concatenate([[False], np.frombuffer(content, np.uint8) == 0, [False]])
    edges = np.flatnonzero(zero[1:] != zero[:-1])
    return int(((edges[1::2] - edges[::2]) // 4).sum())


def described(sparse: int, content: bytes, weights: list[Tensor]) -> tuple[str, float | None]:
    """Return how a file stores weights, and the fraction of their zeros that it contains."""
    zeros = sum(int((w == 0).sum()) for w in weights)
    stored = zero_words(content) / zeros if zeros else None
    if sparse:
        return f"{sparse} sparse tensors", stored
    complete = len(content) >= sum(w.nbytes for w in weights)
    return "dense" if complete and (stored is None or stored >= 0.99) else "unknown", stored


def core_ml(model: nn.Module, x: Tensor, path: Path, sparse: bool = False) -> int:
    import coremltools

    options = {"pass_pipeline": coremltools.PassPipeline.DEFAULT_PRUNING} if sparse else {}
    network = coremltools.convert(
        torch.jit.trace(model, x),
        inputs=[coremltools.TensorType(shape=x.shape)],
        minimum_deployment_target=coremltools.target.iOS16,
        compute_precision=coremltools.precision.FLOAT32,
        skip_model_load=True,
        **options,
    )
    network.save(str(path.with_suffix(".mlpackage")))
    operations = network._mil_program.functions["main"].operations
    return sum(op.op_type == "constexpr_sparse_to_dense" for op in operations)


def core_ml_sparse(model: nn.Module, x: Tensor, path: Path) -> int:
    return core_ml(model, x, path, sparse=True)


def executorch(model: nn.Module, x: Tensor, path: Path) -> int:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(model, (x,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    return 0  # the format declares none; the bytes tell


def openvino_ir(model: nn.Module, x: Tensor, path: Path) -> int:
    import openvino

    network = openvino.convert_model(model, example_input=x)
    openvino.save_model(network, path.with_suffix(".xml"), compress_to_fp16=False)
    return 0  # the format declares none; the bytes tell


def exported_program(model: nn.Module, x: Tensor, path: Path) -> int:
    path = path.with_suffix(".pt2")
    torch.export.save(torch.export.export(model, (x,)), path)
    tensors = torch.export.load(path).state_dict.values()
    return sum(tensor.layout != torch.strided for tensor in tensors)


def onnx(model: nn.Module, x: Tensor, path: Path, sparse: bool = False) -> int:
    import onnx

    export_onnx(model, x, path, sparse_initializers=sparse)
    return len(onnx.load(path).graph.sparse_initializer)


def onnx_sparse(model: nn.Module, x: Tensor, path: Path) -> int:
    return onnx(model, x, path, sparse=True)


def save_sparse(model: nn.Module, _: Tensor, path: Path) -> int:
    feather.save_sparse(model, path)
    with SparseFile(path) as file:
        return sum(entry.layout != "dense" for entry in file.entries.values())


FORMATS: dict[str, tuple[str, Writer]] = {
    "save_sparse": ("safetensors", save_sparse),
    "ONNX": ("onnx", onnx),
    "ONNX, sparse initializers": ("onnx", onnx_sparse),
    "OpenVINO IR": ("openvino", openvino_ir),
    "torch.export, .pt2": ("torch", exported_program),
    "Core ML": ("coremltools", core_ml),
    "Core ML, pruning passes": ("coremltools", core_ml_sparse),
    "ExecuTorch, XNNPACK": ("executorch", executorch),
}


def measure(network: str, sparsity: float, name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    channels, height, width = NETWORKS[network]
    classes = 1000 if network.startswith("timm/") else 10
    model = feather.models.create(network, classes, channels).eval()
    if sparsity:
        prune(model, sparsity)
    vary_norms(model)
    write = FORMATS[name][1]
    with tempfile.TemporaryDirectory() as folder:
        sparse = write(model, torch.zeros(1, channels, height, width), Path(folder, "network"))
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        content = b"".join(path.read_bytes() for path in sorted(files))
    weights = [p for p in model.parameters() if p.dim() > 1]
    text, stored = described(sparse, content, weights)
    row = {"network": network, "sparsity": sparsity, "format": name, "weights": text}
    row |= {"sparse_tensors": sparse, "zeros_in_file": stored}
    return row | {"bytes": len(content), "gzip": len(gzip.compress(content))}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'network':<15}{'zeros':>6}  {'format':<26}{'bytes':>11}{'with gzip':>12}"
        f"{'in file':>9}  weights"
    ]
    for row in rows:
        stored = row["zeros_in_file"]
        lines.append(
            f"{row['network']:<15}{row['sparsity']:>6.0%}  {row['format']:<26}{row['bytes']:>11,}"
            f"{row['gzip']:>12,}{'' if stored is None else f'{stored:.1%}':>9}  {row['weights']}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    os.environ["TQDM_DISABLE"] = "1"

    known = {name: package for name, (package, _) in FORMATS.items() if find_spec(package)}
    facts = provenance(torch.device("cpu"))
    facts["versions"] |= {package: version(package) for package in sorted(set(known.values()))}
    rows = []
    for network in arguments.networks:
        for sparsity in (0.0, *SPARSITIES):
            rows += [measure(network, sparsity, name) for name in known]
    print(", ".join(f"{name} {number}" for name, number in facts["versions"].items()))
    print(f"commit {facts['commit']}\n\n{table(rows)}")
    if arguments.json:
        record = {"command": " ".join(sys.argv), **facts, "results": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
