"""Size of a sparse network's file, and the time to write and read it.

Networks have initial weights, pruned by global magnitude, and perturbed norms and biases, because
initial ones compress better than trained ones. Compared are the sparse file of torch-feather, the
dense safetensors file, that file compressed by zlib (as in .zip and .npz), and the smallest of
dense, bitmask and CSR (16- or 32-bit columns) for each tensor without headers. The column `weights`
is the ratio for the prunable weights alone: the sparse file without the values of other tensors.

    python benchmarks/file_size.py --json results/file_size.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.prunable import find_prunable
from torch_feather.training.provenance import provenance

NETWORKS = ["resnet20", "mobilenet_v1", "timm/resnet50"]
SPARSITIES = [0.8, 0.9, 0.95, 0.98, 0.99]


def prune(model: nn.Module, sparsity: float) -> None:
    weights = [item.parameter for item in find_prunable(model)]
    magnitudes = torch.cat([w.detach().abs().reshape(-1) for w in weights])
    tau = magnitudes.kthvalue(round(sparsity * len(magnitudes))).values
    with torch.no_grad():
        for w in weights:
            w.masked_fill_(w.abs() <= tau, 0.0)


def vary_norms(model: nn.Module) -> None:
    """Perturb norms and biases: their initial values, all 0 or 1, compress too well."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.add_(0.1 * torch.rand_like(tensor))


def classic(tensor: Tensor) -> int:
    """Return the bytes of the smallest of dense, bitmask and CSR (rows: the first axis)."""
    dense = tensor.nbytes
    if tensor.dim() < 2:
        return dense
    rows, count = tensor.shape[0], int(tensor.count_nonzero())
    columns = 2 if tensor[0].numel() <= 2**16 else 4
    bitmask = count * tensor.itemsize + -(-tensor.numel() // 8)
    csr = count * (tensor.itemsize + columns) + 4 * (rows + 1)
    return min(dense, bitmask, csr)


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the median duration of `repeats` calls."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure(network: str, sparsity: float, folder: Path, repeats: int) -> dict[str, Any]:
    model = feather.models.create(network, 1000 if network.startswith("timm/") else 100)
    prune(model, sparsity)
    vary_norms(model)
    state = model.state_dict()
    # "ours" is the key of the sparse file in earlier records.
    dense, sparse, half = (folder / name for name in ("dense", "ours", "half"))
    row: dict[str, Any] = {"network": network, "sparsity": feather.sparsity(model)}
    row["prunable_bytes"] = sum(item.parameter.nbytes for item in find_prunable(model))
    row["dense_write"] = seconds(lambda: safetensors.torch.save_file(state, dense), repeats)
    row["dense_read"] = seconds(
        lambda: model.load_state_dict(safetensors.torch.load_file(dense)), repeats
    )
    row["ours_write"] = seconds(lambda: feather.save_sparse(model, sparse), repeats)
    row["ours_read"] = seconds(lambda: feather.load_sparse(sparse, model), repeats)
    feather.save_sparse(model, half, dtype=torch.float16)
    row |= {f"{path.name}_bytes": path.stat().st_size for path in (dense, sparse, half)}
    others = sum(tensor.nbytes for tensor in state.values()) - row["prunable_bytes"]
    row["weights_bytes"] = row["ours_bytes"] - others
    row["classic_bytes"] = sum(map(classic, state.values()))
    data = dense.read_bytes()
    start = time.perf_counter()
    packed = zlib.compress(data)
    row["zlib_write"] = time.perf_counter() - start
    start = time.perf_counter()
    zlib.decompress(packed)
    row["zlib_read"] = time.perf_counter() - start
    row["zlib_bytes"] = len(packed)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    kinds = {"zlib": "zlib", "classic": "mask/CSR", "ours": "torch-feather", "half": "fp16 values"}
    lines = [
        f"{'network':<14}{'zeros':>7}{'dense':>13}"
        + "".join(f"{label:>20}" for label in kinds.values())
        + f"{'weights':>9}{'write / read: dense':>22}{'zlib':>15}{'torch-feather':>15}"
    ]
    for row in rows:
        sizes = "".join(
            f"{row[f'{kind}_bytes']:>13,} 1/{row['dense_bytes'] / row[f'{kind}_bytes']:4.1f}"
            for kind in kinds
        )
        weights = f"1/{row['prunable_bytes'] / row['weights_bytes']:.1f}"
        times = [
            f"{1e3 * row[f'{kind}_write']:.0f} / {1e3 * row[f'{kind}_read']:.0f} ms"
            for kind in ("dense", "zlib", "ours")
        ]
        lines.append(
            f"{row['network']:<14}{row['sparsity']:>7.2%}{row['dense_bytes']:>13,}{sizes}"
            f"{weights:>9}{times[0]:>22}{times[1]:>15}{times[2]:>15}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--repeats", type=int, default=5, help="writes and reads; zlib: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to FILE")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    facts = provenance(torch.device("cpu"))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{facts['hardware']['cpu']}, 1 thread\n{versions}\ncommit {facts['commit']}")
    print(f"file size in bytes and relative to the dense file; medians of {arguments.repeats}\n")
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(network, sparsity, Path(folder), arguments.repeats)
            for network in arguments.networks
            for sparsity in arguments.sparsities
        ]
    print(table(rows))
    if arguments.json:
        record = {"command": " ".join(sys.argv), **facts, "results": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
