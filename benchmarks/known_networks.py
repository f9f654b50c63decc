"""Known networks, dense and at 90%, 95% and 98%: accuracy, file size and milliseconds on a CPU.

Accuracies are those of the studies in results/. Sizes and times are measured here, of initial
weights that are pruned with ERK densities, with perturbed norms and biases. Times are medians of
one image on one thread: the dense network in PyTorch, and the compiled ones.

    python benchmarks/known_networks.py            # sizes that are missing, and the page
    python benchmarks/known_networks.py --times    # also times that are missing

Both resume: each network is stored when it is done. Times require a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from file_size import vary_norms
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.allocation import ERK
from torch_feather.runtime.timing import alternate
from torch_feather.training.provenance import provenance

RESULTS = Path(__file__).parents[1] / "results"
SPARSITIES = (0.9, 0.95, 0.98)
BUSY = 0.7  # mean number of running processes above which times are not measured


@dataclass(frozen=True)
class Known:
    """A network, and the study in results/ that trained it."""

    name: str
    classes: int
    size: int  # pixels of a side
    study: str = ""
    trained: str = ""  # how, in words


NETWORKS = (
    Known("resnet8", 100, 16, "cifar100-small", "CIFAR-100 at 16×16, 10 epochs"),
    Known("resnet20", 100, 32, "resnet20", "CIFAR-100, 80 epochs"),
    Known("mobilenet_v1", 100, 16, "networks-small", "CIFAR-100 at 16×16, 3 epochs"),
    Known("densenet40_24", 100, 16, "networks-small", "CIFAR-100 at 16×16, 3 epochs"),
    Known("timm/resnet18", 1000, 224),
    Known("timm/resnet50", 1000, 224),
    Known("timm/mobilenetv1_100", 1000, 224),
    Known("timm/mobilenetv3_small_100", 1000, 224),
    Known("timm/efficientnet_b0", 1000, 224),
    Known("timm/convnext_atto", 1000, 224),
    Known("timm/deit_tiny_patch16_224", 1000, 224),
)

HEAD = """# Known networks

    python benchmarks/known_networks.py --times

Networks of the package and of timm, dense and sparse, on a CPU.

- **accuracy**: test accuracy of `feather` in %; mean ± standard deviation, n = 3, of the linked
  study. Empty: not trained here. Short training runs do not show what a network can reach.
- **file**: MB (10⁶ bytes) of the weights in float32. Dense: safetensors; sparse: `save_sparse`.
- **PyTorch**, **compiled**: milliseconds per image, one thread. PyTorch also multiplies by zeros.
  *Compiled* is `compile_sparse`, which skips them. {times}
- Sizes and times are those of initial weights that are pruned with ERK densities, with perturbed
  norms and biases. Both depend on where the zeros are: the trained networks of the accuracies were
  pruned by one threshold for all layers, so theirs differ.
- {machine}

| network | input | zeros | accuracy | file | PyTorch | compiled |
|---|---|---|---|---|---|---|
"""


def create(known: Known, sparsity: float) -> nn.Module:
    """Return a network in eval mode with these zeros."""
    torch.manual_seed(0)
    model = feather.models.create(known.name, known.classes)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():  # some heads begin with zeros
            nn.init.normal_(layer.weight, std=0.02)
    vary_norms(model)
    if sparsity:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        options: dict[str, Any] = {"schedule": "constant", "allocation": ERK()}
        sparsifier = feather.sparsify(
            model, optimizer, "hard-ste", sparsity=sparsity, total_steps=1, **options
        )
        sparsifier.finalize()
    return model.eval()


def sizes(known: Known) -> dict[str, int]:
    """Return bytes of the files by sparsity; "0" is the dense file."""
    import safetensors.torch

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        safetensors.torch.save_file(create(known, 0.0).state_dict(), path)
        found["0"] = path.stat().st_size
        for sparsity in SPARSITIES:
            feather.save_sparse(create(known, sparsity), path)
            found[f"{sparsity:g}"] = path.stat().st_size
    return found


def milliseconds(known: Known, rounds: int = 15) -> dict[str, float]:
    """Return the times of PyTorch ("PyTorch"), and of the compiled networks by sparsity."""
    x = torch.randn(1, 3, known.size, known.size)
    dense = create(known, 0.0)
    networks = {"PyTorch": dense, "0": feather.compile_sparse(dense, x, threads=1)}
    for sparsity in SPARSITIES:
        sparse = create(known, sparsity)
        networks[f"{sparsity:g}"] = checked(feather.compile_sparse(sparse, x, threads=1), sparse, x)
    with torch.inference_mode():
        times = alternate([partial(net, x) for net in networks.values()], rounds=rounds)
    return dict(zip(networks, times, strict=True))


def checked(network: Any, model: nn.Module, x: Tensor) -> Any:
    """Return a compiled network, if it answers as the model does."""
    with torch.inference_mode():
        expected, found = model(x), network(x)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < 1e-3:
        raise SystemExit(f"the compiled network differs by {error:.1e} of the largest answer")
    return network


def accuracies(known: Known) -> dict[str, list[float]]:
    """Return the test accuracies in % by sparsity, one for each seed."""
    found: dict[str, list[float]] = {}
    if known.study:
        for row in json.loads((RESULTS / known.study / "runs.json").read_text()):
            if row["network"] == known.name and row["label"] in ("feather", "dense"):
                found.setdefault(f"{row['sparsity']:g}", []).append(100 * row["test_accuracy"])
    return found


def page(stored: dict[str, Any]) -> str:
    """Return the page of all networks that were measured."""
    rows, machines, timed = [], {}, set()
    for known in NETWORKS:
        one = stored.get(known.name)
        if one is None:
            continue
        times, trained = one.get("ms", {}), accuracies(known)
        facts = one.get("timed_on") or one["measured_on"]
        machines[f"{facts['hardware']['cpu']}, {versions(facts)}, commit {facts['commit']}"] = None
        timed |= {known.name} if times else set()
        for key, size in one["bytes"].items():
            values = trained.get(key, [])
            accuracy = f"{statistics.mean(values):.1f}" if values else ""
            if len(values) > 1:
                accuracy += f" ± {statistics.stdev(values):.1f}"
            if values:
                accuracy += f" ([{known.trained}]({known.study}/table.md))"
            smaller = f" (1/{one['bytes']['0'] / size:.1f})" if key != "0" else ""
            cells = (
                f"`{known.name}`",
                f"{known.size}×{known.size}",
                f"{100 * float(key):g}%" if key != "0" else "dense",
                accuracy,
                f"{size / 1e6:.3g}{smaller}",
                f"{times['PyTorch']:.3g}" if times and key == "0" else "",
                f"{times[key]:.3g}" if times else "",
            )
            rows.append(f"| {' | '.join(cells)} |\n")
    about = "" if len(timed) == len(NETWORKS) else "Empty: not measured yet."
    head = HEAD.format(times=about, machine="; ".join(machines))
    return "".join(f"{line.rstrip()}\n" for line in head.splitlines()) + "".join(rows)


def versions(facts: dict[str, Any]) -> str:
    """Return the versions that were measured, as text."""
    return ", ".join(f"{name} {version}" for name, version in facts["versions"].items())


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--times", action="store_true", help="measure milliseconds that are missing"
    )
    parser.add_argument("--busy", action="store_true", help="measure them on a busy machine too")
    names = [known.name for known in NETWORKS]
    parser.add_argument("--networks", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS / "known_networks.json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    if options.times and load > BUSY and not options.busy:
        raise SystemExit(
            f"{load:.1f} processes run on this machine on average. Times require a quiet machine: "
            "wait a few minutes after the last program, or pass --busy."
        )
    facts = provenance(torch.device("cpu"))  # before this program writes files of the repository
    stored = json.loads(options.out.read_text()) if options.out.exists() else {}
    for known in NETWORKS:
        one = stored.setdefault(known.name, {}) if known.name in options.networks else None
        if one is None:
            continue
        if "bytes" not in one:
            one |= {"bytes": sizes(known), "measured_on": facts}
        if options.times and "ms" not in one:
            one |= {"ms": milliseconds(known), "timed_on": facts}
        options.out.write_text(json.dumps(stored, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(page(stored))
        print(
            f"{known.name}: {one['bytes']} bytes, {one.get('ms', 'times not measured')}", flush=True
        )


if __name__ == "__main__":
    main()
