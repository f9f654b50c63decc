"""Latency of many networks of timm and torchvision, pruned with ERK densities, on one CPU thread.

Systems take turns on one image: torch-feather at several sparsities, and OpenVINO, ONNX Runtime and
PyTorch on dense weights. Times are medians of CPU time, which processes that take turns on the core
hardly change; the ratio is the faster of OpenVINO and ONNX Runtime over torch-feather. Weights are
random, with a fixed seed: times depend on their positions, not on their values. Weights and norms
that begin with zeros get other values, since zeros would be left out. Layers without a nonzero
weight are reported.

    python benchmarks/inference.py --zoo --json results/inference_zoo.json

Networks that the file has already are not measured again. Options: --networks NAME ...,
--sparsity S ..., --narrow (OpenVINO in bfloat16, and in int8 with NNCF), --batch N,
--pruned-engines (ONNX Runtime with sparse initializers, and OpenVINO, on the pruned weights).
Optional packages: pip install timm torchvision openvino onnxruntime onnx onnxscript nncf. Missing
ones are skipped. Each row has the fraction of the time of each kind of step, for each sparsity.

    python benchmarks/inference.py --zoo --compile-times --repeats 3

measures `compile_sparse` alone, each time in a process of its own. CPU seconds: of a process that
has imported torch, the library of the network and torch_feather, but not yet what only compilation
imports. Peak memory, on Linux: what is resident above the loaded model, whose weights do not count,
in a process that has compiled a small network before.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inference_details import breakdown
from inference_systems import dense_systems, engines_on_pruned_weights
from torch import Tensor, nn

import torch_feather as feather
from torch_feather.allocation import ERK

# Networks by kind, with the goals of the ratio at 95% and 98%; at 90% the goal is 1.
GOALS = {"convolutional": (2.5, 4.0), "mobile": (1.5, 2.0), "transformer": (2.0, 2.5)}
NETWORKS = {
    "convolutional": (
        *("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg16_bn", "repvgg_a0"),
        *("densenet121", "inception_v3", "regnety_008", "hrnet_w18_small", "dla34", "cspresnet50"),
        *("convnext_atto", "res2net50_26w_4s"),
    ),
    "mobile": (
        *("mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100", "ghostnet_100"),
        *("efficientnet_b0", "mnasnet_100", "regnety_004", "lcnet_100"),
        *("torchvision:lraspp_mobilenet_v3_large", "torchvision:shufflenet_v2_x1_0"),
        "torchvision:ssdlite320_mobilenet_v3_large",
    ),
    "transformer": (
        *("deit_tiny_patch16_224", "deit_small_patch16_224", "mixer_s16_224"),
        *("swin_tiny_patch4_window7_224", "poolformer_s12"),
    ),
}


# Ways to compute a batch, with their chunk_size.
FORMS: dict[str, Any] = {"one_image_ms": 1, "whole_ms": None}


class Detector(nn.Module):
    """The layers of a detector of torchvision; boxes are not decoded or filtered."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.head(list(self.backbone(x).values()))
        return found["cls_logits"], found["bbox_regression"]


def create(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network in eval mode, and an image."""
    torch.manual_seed(0)
    if name.startswith("torchvision:"):
        import torchvision

        name, size = name.partition(":")[2], 224
        options = {} if "shufflenet" in name else {"weights_backbone": None}
        model = torchvision.models.get_model(name, weights=None, **options)
        if "ssdlite" in name:
            model, size = Detector(model), 320
    else:
        import timm

        model = timm.create_model(name)
        size = model.default_cfg["input_size"][1]
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.any():
            continue
        # Some layers begin with zeros. A convolution before such a norm would be left out.
        if weight.dim() == 1:
            nn.init.ones_(weight)
        else:
            nn.init.normal_(weight, std=0.02)
    return model.eval(), torch.randn(1, 3, size, size)


def pruned(name: str, sparsity: float) -> tuple[nn.Module, list[str]]:
    """Return a network with ERK densities, and the names of weights that are 0."""
    model, _ = create(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = feather.sparsify(
        model,
        optimizer,
        "hard-ste",
        sparsity=sparsity,
        total_steps=1,
        schedule="constant",
        allocation=ERK(),
    )
    pruned_model = sparsifier.finalize().eval()
    empty = [n for n, p in pruned_model.named_parameters() if p.dim() > 1 and not p.any()]
    return pruned_model, empty


def first(output: Any) -> Tensor:
    """Return the first tensor of an output."""
    return next(v for v in torch.utils._pytree.tree_leaves(output) if isinstance(v, Tensor))


def measure(
    name: str,
    kind: str,
    sparsities: list[float],
    narrow: bool = False,
    batch: int = 1,
    pruned_engines: bool = False,
) -> dict[str, Any]:
    """Return the row of a network.

    Args:
        name: the network.
        kind: its kind.
        sparsities: of the networks of torch-feather.
        narrow: whether to measure OpenVINO in bfloat16 and int8, too.
        batch: number of images. If it is above 1, networks that compute one image at a time, and
            whole batches, are measured beside those that choose.
        pruned_engines: whether to measure other engines on the pruned weights, too.
    """
    from torch_feather.runtime.timing import alternate

    model, x = create(name)
    x = x if batch == 1 else torch.randn(batch, *x.shape[1:])
    systems = dense_systems(model, x, threads=1, compiles=False, narrow=narrow)
    networks: dict[tuple[float, str], Callable[[Tensor], object]] = {}
    row: dict[str, Any] = {"network": name, "kind": kind, "size": x.shape[-1], "sparse": {}}
    row["batch"] = batch
    if pruned_engines:
        row["pruned_ms"] = {}
    for sparsity in sparsities:
        sparse_model, empty = pruned(name, sparsity)
        begin = time.process_time()
        network = feather.compile_sparse(sparse_model, x, threads=1)
        seconds = time.process_time() - begin
        with torch.inference_mode():
            found, expected = first(network(x)), first(sparse_model(x))
            parts = parts_of_time(network, x)
        networks[sparsity, "ms"] = network
        if batch > 1:
            for form, size in FORMS.items():
                networks[sparsity, form] = feather.compile_sparse(
                    sparse_model, x, threads=1, chunk_size=size
                )
        if pruned_engines:
            for engine, run in engines_on_pruned_weights(sparse_model, x, threads=1).items():
                networks[sparsity, engine] = run
        row["sparse"][str(sparsity)] = {
            "compile_s": seconds,
            "error": float((found - expected).abs().max() / expected.abs().max()),
            "empty": empty,
            "sparse_layers": sum(t.sparse for t in network.tuning.values()),
            "layers": len(network.tuning),
            "in_pytorch": repr(network).rpartition("in PyTorch: ")[2][:-2]
            if "in PyTorch" in repr(network)
            else "",
            "parts": parts,
        }
    calls: list[Callable[[], object]] = [partial(run, x) for run in systems.values()]
    calls += [partial(network, x) for network in networks.values()]
    with torch.inference_mode():
        times = alternate(calls, rounds=9, burst=3, clock=time.process_time)
    row["dense_ms"] = dict(zip(systems, times, strict=False))
    for (sparsity, form), ms in zip(networks, times[len(systems) :], strict=True):
        if form == "ms" or form in FORMS:
            row["sparse"][str(sparsity)][form] = ms
        else:
            row["pruned_ms"].setdefault(str(sparsity), {})[form] = ms
    return row


def parts_of_time(network: feather.runtime.SparseModule, x: Tensor) -> dict[str, float]:
    """Return the fraction of the time of each kind of step, the largest first."""
    spent = breakdown(network, x)
    parts = {name: ms / sum(spent.values()) for name, ms in spent.items()}
    return dict(sorted(parts.items(), key=lambda part: -part[1]))


def best_dense(row: dict[str, Any]) -> float | None:
    """Return the milliseconds of the faster of OpenVINO and ONNX Runtime."""
    rivals = [ms for n, ms in row["dense_ms"].items() if n in ("OpenVINO f32", "onnxruntime")]
    return min(rivals, default=None)


def table(rows: list[dict[str, Any]]) -> str:
    """Return all rows as text."""
    lines = [
        f"{'network':34} {'PyTorch':>8} {'OpenVINO':>8} {'ORT':>8}   torch-feather: ms (ratio), "
        "compile s, error"
    ]
    if any(row.get("batch", 1) > 1 for row in rows):
        lines.append(f"{'':63}[ms for one image at a time, for the whole batch]")
    for row in rows:
        dense = row["dense_ms"]
        names = ("PyTorch", "OpenVINO f32", "onnxruntime")
        cells = [f"{dense[n]:8.2f}" if n in dense else f"{'':8}" for n in names]
        best, parts = best_dense(row), []
        for sparsity, found in row["sparse"].items():
            ratio = f" ({best / found['ms']:.2f}x)" if best else ""
            parts.append(f"{100 * float(sparsity):g}%: {found['ms']:.2f}{ratio}")
            if "whole_ms" in found:
                parts[-1] += f" [{found['one_image_ms']:.2f}, {found['whole_ms']:.2f}]"
        slowest = max(found["compile_s"] for found in row["sparse"].values())
        error = max(found["error"] for found in row["sparse"].values())
        parts.append(f"{slowest:.1f} s, {error:.0e}")
        lines.append(f"{row['network']:34} {' '.join(cells)}   {', '.join(parts)}")
        narrow = [f"{n} {ms:.2f}" for n, ms in dense.items() if n not in names]
        if narrow:
            lines.append(f"{'':34} {', '.join(narrow)}")
        for sparsity, found in row.get("pruned_ms", {}).items():
            times = ", ".join(f"{n} {ms:.2f}" for n, ms in found.items())
            lines.append(f"{'':34} weights of {100 * float(sparsity):g}%: {times}")
        empty = {n for found in row["sparse"].values() for n in found["empty"]}
        if empty:
            lines.append(f"{'':34} empty layers: {', '.join(sorted(empty))}")
        lines += [f"{'':34} {text}" for text in below_goal(row, best)]
    return "\n".join(lines) + "\n"


def below_goal(row: dict[str, Any], best: float | None) -> list[str]:
    """Return, for each sparsity below its goal, where the network spends its time."""
    found = []
    if row.get("batch", 1) > 1:  # the goals are for one image
        return found
    goals = dict(zip((0.95, 0.98), GOALS[row["kind"]], strict=True)) | {0.9: 1.0}
    for sparsity, result in row["sparse"].items():
        goal = goals.get(float(sparsity))
        if best and goal and best / result["ms"] < goal:
            outside = result["in_pytorch"] or "nothing"
            dense = result["layers"] - result["sparse_layers"]
            text = (
                f"below {goal}x at {100 * float(sparsity):g}%: {dense} dense layers; in PyTorch: "
            )
            parts = list(result.get("parts", {}).items())[:3]  # older rows have none
            time_of = ", ".join(f"{name} {100 * part:.0f}%" for name, part in parts)
            found.append(f"{text}{outside[:200]}{f'; time: {time_of}' if parts else ''}")
    return found


CLEAR = Path("/proc/self/clear_refs")  # writing 5 sets the peak to the current memory


def compile_seconds(name: str, sparsity: float) -> float:
    """Return the CPU seconds of the first compilation of this process, without its imports."""
    importlib.import_module("torch_feather.runtime.capture")
    for module in ("torch.export._trace", "torch._functorch.aot_autograd"):  # of torch.export
        importlib.import_module(module)
    torch.set_num_threads(1)
    model, _ = pruned(name, sparsity)
    _, x = create(name)
    begin = time.process_time()
    feather.compile_sparse(model, x, threads=1)
    return time.process_time() - begin


def compile_memory(name: str, sparsity: float) -> tuple[float, float]:
    """Return MB of the peak memory of a compilation, above the loaded model, and of its weights."""
    torch.set_num_threads(1)
    feather.compile_sparse(nn.Conv2d(3, 16, 3), torch.zeros(1, 3, 32, 32))  # imports what it needs
    model, _ = pruned(name, sparsity)
    _, x = create(name)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()
    CLEAR.write_text("5")
    before = resident_memory("VmRSS")
    feather.compile_sparse(model, x, threads=1)
    return (resident_memory("VmHWM") - before) / 1e6, weights / 1e6


def save_network(name: str, sparsity: float, path: str) -> None:
    """Compile a network and write it to a file."""
    torch.set_num_threads(1)
    model, _ = pruned(name, sparsity)
    _, x = create(name)
    feather.save_compiled(feather.compile_sparse(model, x, threads=1), path)


def load_seconds(path: str) -> float:
    """Return the CPU seconds to load a file of `save_compiled`, without imports."""
    importlib.import_module("torch_feather.runtime.saved")
    importlib.import_module("torch_feather.runtime.kernels").host()  # imports LLVM
    torch.set_num_threads(1)
    begin = time.process_time()
    feather.load_compiled(path, threads=1)
    return time.process_time() - begin


def resident_memory(field: str) -> int:
    """Return bytes of this process: VmRSS, or VmHWM for their peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def in_new_process(call: str) -> Any:
    """Return the result of a function of this file, called in a process of its own."""
    code = f"import json, inference_zoo as z; print(json.dumps(z.{call}))"
    command = [sys.executable, "-c", code]
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compile_row(name: str, sparsities: list[float], repeats: int) -> dict[str, Any]:
    """Return the row of a network: the costs of each compilation, by sparsity."""
    row: dict[str, Any] = {"network": name, "compile_s": {}, "load_s": {}, "peak_mb": {}}
    for sparsity in sparsities:
        given = f"({name!r}, {sparsity})"
        times = [in_new_process(f"compile_seconds{given}") for _ in range(repeats)]
        row["compile_s"][str(sparsity)] = times
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder, "network"))
            in_new_process(f"save_network({name!r}, {sparsity}, {path!r})")
            times = [in_new_process(f"load_seconds({path!r})") for _ in range(repeats)]
        row["load_s"][str(sparsity)] = times
        if os.access(CLEAR, os.W_OK):
            peak, row["weights_mb"] = in_new_process(f"compile_memory{given}")
            row["peak_mb"][str(sparsity)] = peak
    return row


def compile_table(rows: list[dict[str, Any]]) -> str:
    """Return the medians of all rows as text, with the shortest and the longest time."""
    lines = []
    for row in rows:
        parts = []
        for sparsity, times in row["compile_s"].items():
            text = (
                f"{100 * float(sparsity):g}%: {statistics.median(times):.2f} s "
                f"({min(times):.2f} to {max(times):.2f})"
            )
            if loads := row.get("load_s", {}).get(sparsity):
                text += f", load {statistics.median(loads):.2f} s (to {max(loads):.2f})"
            if (mb := row.get("peak_mb", {}).get(sparsity)) is not None:
                text += f", {mb:.0f} MB ({mb / row['weights_mb']:.2f} x weights)"
            parts.append(text)
        lines.append(f"{row['network']:34} {'; '.join(parts)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the networks that the file does not have yet."""
    from torch_feather.training.provenance import provenance

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = {name: kind for kind, names in NETWORKS.items() for name in names}
    parser.add_argument("--zoo", action="store_true", help="measure many networks")
    parser.add_argument("--networks", nargs="+", choices=list(kinds), default=list(kinds))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--narrow", action="store_true", help="OpenVINO in bfloat16 and int8 too")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument(
        "--pruned-engines", action="store_true", help="other engines on the pruned weights too"
    )
    parser.add_argument("--compile-times", action="store_true", help="measure compilation alone")
    parser.add_argument("--repeats", type=int, default=1, help="of --compile-times")
    parser.add_argument(
        "--json",
        type=Path,
        help="[default: results/inference_zoo.json, inference_zoo_batchN.json or "
        "compile_times.json]",
    )
    options = parser.parse_args()
    batch = f"_batch{options.batch}" if options.batch > 1 else ""
    name = "compile_times" if options.compile_times else f"inference_zoo{batch}"
    path, make_table = options.json or Path(f"results/{name}.json"), table
    if options.compile_times:
        make_table = compile_table
    torch.set_num_threads(1)
    stored: dict[str, Any] = {"rows": []}
    if path.exists():
        stored = json.loads(path.read_text())
    rows = stored["rows"]
    if any(row.get("batch", 1) != options.batch for row in rows):
        parser.error(f"{path} has another batch. Choose another --json.")
    stored["command"] = " ".join(["python benchmarks/inference.py", *sys.argv[1:]])
    stored |= provenance(torch.device("cpu"))
    for name in options.networks:
        if any(row["network"] == name for row in rows):
            continue
        if options.compile_times:
            row = compile_row(name, options.sparsity, options.repeats)
        else:
            row = measure(
                name,
                kinds[name],
                options.sparsity,
                options.narrow,
                options.batch,
                options.pruned_engines,
            )
        rows.append(row | {"commit": stored["commit"]})
        path.write_text(json.dumps(stored, indent=1) + "\n")
        versions = ", ".join(f"{name} {number}" for name, number in stored["versions"].items())
        heading = f"{stored['hardware']['cpu']}, one thread, batch {options.batch}, float32\n"
        commits = ", ".join(dict.fromkeys(r["commit"] or "unknown" for r in rows))
        path.with_suffix(".txt").write_text(
            f"{heading}{versions}, commit {commits}\n{stored['command']}\n\n{make_table(rows)}"
        )
        print(make_table(rows[-1:]), flush=True)


if __name__ == "__main__":
    main()
