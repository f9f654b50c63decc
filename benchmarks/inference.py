"""Latency of a network on this CPU: dense systems, and torch-feather at several sparsities.

The weights are the latent weights of a training run, pruned to each sparsity by global magnitude or
with ERK densities (Mocanu et al., 2018; Evci et al., 2020). Systems take turns on the same input,
with several calls per turn. Times are medians, ratios are ratios of medians. Dense systems process
a batch as a whole and image by image; the faster way counts.

    python benchmarks/inference.py --run runs/resnet50 --run runs/mobilenet \\
        --json results/inference.json

`python benchmarks/inference.py --zoo` measures many networks instead, see `inference_zoo.py`.

Optional packages: pip install openvino onnxruntime onnx onnxscript. Missing ones are skipped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import inference_zoo
import numpy as np
import torch
from inference_details import breakdown, multiply_adds, peak
from inference_systems import System, dense_systems
from renamed_options import current_options
from torch import Tensor, nn

import torch_feather as feather
from torch_feather import models
from torch_feather.allocation import ERK, Global
from torch_feather.runtime.timing import alternate
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.provenance import provenance

Call = Callable[[], object]
ALLOCATIONS = {"global": Global, "erk": ERK}
BOUND = 1e-5  # relative to the largest output; rounding differs less from PyTorch


def trained(run: RunDirectory, classes: int) -> nn.Module:
    """Return the network of a run with its latent weights, from a checkpoint of SGD."""
    model = models.create(run.read_config().network, classes)
    run.load_model(model)
    state = torch.load(run.path / "checkpoints" / "last.pt", weights_only=True)["optimizer"]
    weights = [p for p in model.parameters() if p.ndim > 1]
    with torch.no_grad():
        for index, weight in zip(state["param_groups"][0]["params"], weights, strict=True):
            weight.copy_(state["state"][index]["feather_latent"])
    return model


def prune(run: RunDirectory, classes: int, sparsity: float, allocation: str) -> nn.Module:
    """Return the network of a run, pruned from its latent weights."""
    model = trained(run, classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = feather.sparsify(
        model,
        optimizer,
        "hard-ste",
        sparsity=sparsity,
        total_steps=1,
        schedule="constant",
        allocation=ALLOCATIONS[allocation](),
    )
    pruned = sparsifier.finalize()
    assert abs(feather.sparsity(pruned) - sparsity) < 1e-4
    return pruned.eval()


def dense_calls(model: nn.Module, x: Tensor, threads: int) -> dict[str, dict[str, Call]]:
    """Return the ways to run a batch, by system."""
    calls: dict[str, dict[str, Call]] = {
        name: {"whole": partial(run, x)} for name, run in dense_systems(model, x, threads).items()
    }
    if len(x) > 1:
        for name, run in dense_systems(model, x[:1], threads).items():
            calls[name]["image by image"] = partial(image_by_image, run, x)
    return calls


def dense_times(calls: dict[str, dict[str, Call]], burst: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each system and way."""
    flat = [call for ways in calls.values() for call in ways.values()]
    with torch.inference_mode():
        times = iter(alternate(flat, rounds=3, burst=burst))
    return {name: {way: next(times) for way in ways} for name, ways in calls.items()}


def image_by_image(run: System, x: Tensor) -> None:
    for image in x.split(1):
        run(image)


def measure(
    model: nn.Module,
    x: Tensor,
    others: list[Call],
    threads: int,
    chunk_size: int | str | None,
    tuning: dict[str, Any] | None,
) -> tuple[feather.runtime.SparseModule, list[float], dict[str, float]]:
    """Compile a sparse network and time it in turns with other calls.

    Args:
        model: the pruned network.
        x: a batch.
        others: other calls to time.
        threads: CPU threads.
        chunk_size: images that are processed together, see `compile_sparse`.
        tuning: tuning results of the same network; None to tune it.

    Returns:
        The compiled network; milliseconds, its own first; and errors relative to the largest
        output: `error` against PyTorch, `differs` between two random batches.
    """
    example = x[:chunk_size] if isinstance(chunk_size, int) else x
    module = feather.compile_sparse(
        model, example, threads=threads, tuning=tuning, chunk_size=chunk_size
    )
    with torch.inference_mode():
        expected, found, unlike = model(x), module(x), model(torch.randn_like(x))
        times = alternate([partial(module, x), *others], rounds=7 if len(x) == 1 else 3)
    largest = expected.abs().max()
    errors = {
        "error": float((expected - found).abs().max() / largest),
        "differs": float((expected - unlike).abs().max() / largest),
    }
    return module, times, errors


class Session:
    """All measurements of one command: its options, tuning results and recorded rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self.tuning: dict[Any, Any] = {}  # results of the first number of threads
        self.facts = provenance(torch.device("cpu"))
        self.peak = peak()
        self.command = " ".join(["python benchmarks/inference.py", *sys.argv[1:]])

    def header(self) -> str:
        """Return hardware, versions and command."""
        return (
            f"{self.facts['hardware']['cpu']}: {self.peak:.1f} G multiply-adds per second and core "
            f"at most\n{self.facts['versions']}, commit {self.facts['commit']}\n{self.command}\n"
        )

    def save(self) -> None:
        """Write all rows to `--json`."""
        if self.options.json:
            result = {
                "command": self.command,
                **self.facts,
                "peak_gmacs_per_s": self.peak,
                "rows": self.rows,
            }
            self.options.json.write_text(json.dumps(result, indent=1) + "\n")

    def measure_batch(self, run: RunDirectory, threads: int, batch: int) -> None:
        """Measure dense systems, then each allocation and sparsity, for one batch size."""
        options, network = self.options, run.read_config().network
        torch._dynamo.reset()  # it stops compiling a network after several compilations
        x = torch.randn(batch, 3, options.size, options.size)
        head = {"network": network, "threads": threads, "batch": batch}
        calls = dense_calls(prune(run, options.classes, 0.95, "global"), x, threads)
        dense = dense_times(calls, burst=3 if batch == 1 else 1)
        best = {name: min(found, key=found.__getitem__) for name, found in dense.items()}
        rivals = [name for name in calls if "OpenVINO" in name] or ["PyTorch"]
        self.rows.append(head | {"system": "dense", "ms": dense})
        print(f"{network}, {threads} thread(s), batch {batch}:")
        shown = (f"{n} {dense[n][way]:.2f} ({way})" for n, way in best.items())
        print("  " + ", ".join(shown) + " ms")
        rival_calls = {name: calls[name][best[name]] for name in rivals}
        rivals_ms: dict[str, list[float]] = defaultdict(list)
        for allocation, sparsity in itertools.product(options.allocation, options.sparsity):
            model = prune(run, options.classes, sparsity, allocation)
            row = head | self.measure_sparse(model, x, head, allocation, sparsity, rival_calls)
            row["ways"] = best
            self.rows.append(row)
            for name, ms in row["rivals_ms"].items():
                rivals_ms[name].append(ms)
            print(line(row), flush=True)
            self.save()
        shown = (f"{name} {np.median(ms):.2f}" for name, ms in rivals_ms.items())
        print(f"  medians over these measurements: {', '.join(shown)} ms\n")

    def measure_sparse(
        self,
        model: nn.Module,
        x: Tensor,
        head: dict[str, Any],
        allocation: str,
        sparsity: float,
        rivals: dict[str, Call],
    ) -> dict[str, Any]:
        """Measure one sparse network in turns with dense systems; return its row.

        Raises:
            SystemExit: its output differs from PyTorch's by more than rounding.
        """
        chunk = self.options.chunk_size
        key = (head["network"], len(x), chunk, allocation, sparsity)
        module, (ms, *others), errors = measure(
            model, x, list(rivals.values()), head["threads"], chunk, self.tuning.get(key)
        )
        self.tuning.setdefault(key, module.tuning)
        if not errors["error"] < BOUND:
            sys.exit(f"{head['network']} at {sparsity}: relative error {errors['error']:.0e}")
        rate = multiply_adds(module) * len(x) / ms / 1e6
        return {
            "system": "ours",  # as in earlier records
            "allocation": allocation,
            "sparsity": sparsity,
            "ms": ms,
            "rivals_ms": dict(zip(rivals, others, strict=True)),
            **errors,
            "sparse_layers": sum(c.sparse for c in module.tuning.values()),
            "layers": len(module.tuning),
            "gmacs_per_s": rate,
            "of_peak": rate / self.peak / head["threads"],
            "chunk_size": module.chunk_size,
            "parts_ms": breakdown(module, x[: module.given_chunk_size]),
        }


def line(row: dict[str, Any]) -> str:
    """Return the printed line of a sparse network."""
    faster = ", ".join(f"{ms / row['ms']:.2f}× {name}" for name, ms in row["rivals_ms"].items())
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in row["parts_ms"].items())
    return (
        f"  torch-feather {row['allocation']:6} {100 * row['sparsity']:5.1f}%: "
        f"{row['ms']:8.2f} ms, {faster}, error {row['error']:.0e} "
        f"(outputs of two batches differ by {row['differs']:.0e}), "
        f"{row['sparse_layers']} of {row['layers']} layers sparse, "
        f"{row['chunk_size'] or 'all'} images together, "
        f"{row['gmacs_per_s']:5.1f} G/s = {100 * row['of_peak']:.0f}% of peak; {parts}"
    )


def chunk_size(text: str) -> int | str | None:
    """Return the `chunk_size` that an option names."""
    return None if text == "whole" else text if text == "auto" else int(text)


def main() -> None:
    if "--zoo" in sys.argv:
        inference_zoo.main()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, action="append", required=True)
    parser.add_argument("--classes", type=int, default=10, help="classes of the runs")
    parser.add_argument("--size", type=int, default=224, help="height and width of images")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--allocation", nargs="+", default=list(ALLOCATIONS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--chunk-size",
        type=chunk_size,
        default="auto",
        help="images processed together: a number, whole, or auto, the faster of 1 and whole",
    )
    parser.add_argument("--json", type=Path)
    session = Session(parser.parse_args(current_options(None, {"--at-a-time": "--chunk-size"})))
    print(session.header())
    for path in session.options.run:
        for threads in session.options.threads:
            torch.set_num_threads(threads)
            for batch in session.options.batch:
                session.measure_batch(RunDirectory(path), threads, batch)


if __name__ == "__main__":
    main()
