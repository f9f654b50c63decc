"""Time of exported native libraries on this machine, in turn with `compile_sparse`.

Networks are those of `inference_zoo.py`: 95% zeros with ERK densities, random weights, one image,
one thread. Two libraries of each are timed: one with the tiles that the export chooses without
measurements, and one with the measured tiles of `compile_sparse`. Libraries are called by
`torch_feather_runtime`, whose copies of inputs and outputs count.

    python benchmarks/native_speed.py --json results/native_speed.json

Packages: timm, llvmlite, and a compiler that links (gcc or ziglang).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inference_zoo import create, pruned

import torch_feather as feather
from torch_feather.runtime.timing import alternate
from torch_feather.training.provenance import provenance

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "packages/torch-feather-runtime/src"))
import torch_feather_runtime as runtime  # noqa: E402

NETWORKS = ("resnet18", "resnet50", "mobilenetv3_large_100", "deit_tiny_patch16_224")
SPARSITY = 0.95


def measure(name: str) -> dict[str, Any]:
    """Return the row of a network: milliseconds and the largest error of both libraries."""
    _, x = create(name)
    model, _ = pruned(name, SPARSITY)
    with torch.inference_mode():
        expected = model(x).numpy()
    network = feather.compile_sparse(model, x, threads=1)
    with tempfile.TemporaryDirectory() as made:
        libraries = []
        for tuning in (None, network.tuning):
            folder = Path(made) / str(len(libraries))
            feather.export_native(model, x, folder, "host", tuning=tuning)
            libraries.append(runtime.load(folder / "libmodel.so"))
        image = x.numpy()
        errors = [np.abs(first(one(image)) - expected).max() for one in libraries]
        calls = [lambda: network(x), *(lambda one=one: one(image) for one in libraries)]
        compiled, chosen, measured = alternate(calls, rounds=15)
    return {
        "network": name,
        "compiled_ms": compiled,
        "library_ms": chosen,
        "library_with_measured_tiles_ms": measured,
        "error": float(max(errors) / np.abs(expected).max()),
    }


def first(outputs: Any) -> np.ndarray:
    """Return the output of a library that has one."""
    return outputs if isinstance(outputs, np.ndarray) else outputs[0]


def table(rows: list[dict[str, Any]]) -> str:
    """Return all rows as text."""
    lines = [
        f"{'network':24}{'compile_sparse':>15}{'library':>10}{'measured tiles':>16}{'error':>9}"
    ]
    for row in rows:
        times = row["compiled_ms"], row["library_ms"], row["library_with_measured_tiles_ms"]
        shown = "{:>12.2f} ms{:>7.2f} ms{:>13.2f} ms".format(*times)
        lines.append(f"{row['network']:24}{shown}{row['error']:>9.0e}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the networks and write a record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--json", type=Path, help="the record; the table is beside it as .txt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = provenance(torch.device("cpu"))
    rows = [measure(name) for name in options.networks]
    command = " ".join(["python benchmarks/native_speed.py", *sys.argv[1:]])
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    heading = f"{facts['hardware']['cpu']}, float32, batch 1, one thread\n{versions}\n"
    heading += f"commit {facts['commit']}\n{command}\n\n"
    print(heading + table(rows))
    if options.json:
        record = {"command": command, **facts, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
        options.json.with_suffix(".txt").write_text(heading + table(rows))


if __name__ == "__main__":
    main()
