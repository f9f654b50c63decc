"""Multiply-adds that networks of the zoo keep with ERK densities: counted, not timed.

Networks are those of `inference_zoo.py`. ERK prunes small layers less than large ones, so a network
keeps a larger fraction of its multiply-adds than of its weights if its small layers have many
pixels. Counts are those of `count_flops`: convolutions and linear layers, one image. The columns:
the fraction of the multiply-adds that is kept, and the fraction of the dense network's
multiply-adds in layers that keep more than half of them.

    python benchmarks/kept_multiply_adds.py --json results/kept_multiply_adds.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from inference_zoo import create, pruned

import torch_feather as feather
from torch_feather.training.provenance import provenance

NETWORKS = (
    *("resnet18", "resnet50", "vgg16_bn", "mobilenetv2_100", "mobilenetv3_large_100"),
    *("mobilenetv3_small_100", "mnasnet_100", "lcnet_100"),
)


def measure(name: str, sparsity: float) -> dict[str, Any]:
    """Return the row of a network at one sparsity."""
    _, x = create(name)
    model, _ = pruned(name, sparsity)
    flops = feather.count_flops(model, x)
    row = {"network": name, "sparsity": sparsity, "dense": flops.dense, "kept": flops.sparse}
    half = sum(layer.dense for layer in flops.layers if 2 * layer.sparse > layer.dense)
    return row | {"in_dense_layers": half}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'network':24}{'zeros':>6}{'dense, M':>10}{'kept':>8}{'in layers above 1/2':>21}"]
    for row in rows:
        lines.append(
            f"{row['network']:24}{row['sparsity']:>6.0%}{row['dense'] / 1e6:>10.1f}"
            f"{row['kept'] / row['dense']:>8.1%}{row['in_dense_layers'] / row['dense']:>21.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all counts to FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = provenance(torch.device("cpu"))
    rows = [measure(name, sparsity) for name in options.networks for sparsity in options.sparsity]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    print(f"{versions}\ncommit {facts['commit']}\n\n{table(rows)}")
    if options.json:
        command = " ".join(["python benchmarks/kept_multiply_adds.py", *sys.argv[1:]])
        record = {"command": command, **facts, "results": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
