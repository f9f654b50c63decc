"""Milliseconds of a network on this CPU: dense systems, and ours at several sparsities.

The weights are those of a training run (its latent ones, so that every sparsity can be had), pruned
by global magnitude, or with the layers' densities by ERK (Mocanu et al., 2018; Evci et al., 2020).
Contestants take turns on the same input, several calls each time; a time is a median, a ratio one
of medians. Of batches the others get theirs whole and image by image, and the faster way counts.

    python benchmarks/inference.py --run runs/resnet50 --run runs/mobilenet \\
        --json results/inference.json

The extra packages: pip install openvino onnxruntime onnx onnxscript; what is missing is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import torch_feather as feather
from torch_feather import models
from torch_feather.allocation import ERK, Global
from torch_feather.runtime.bound import Workspace
from torch_feather.runtime.kernels import llvm, machine, vector_widths
from torch_feather.runtime.layer import MaxPool
from torch_feather.runtime.plan import Copy, Sparse
from torch_feather.runtime.timing import alternate
from torch_feather.training.checkpoint import RunDirectory
from torch_feather.training.provenance import provenance

Call = Callable[[], object]
System = Callable[[Tensor], object]
ALLOCATIONS = {"global": Global, "erk": ERK}
BOUND = 1e-5  # of the largest output: further from PyTorch's than rounding takes it


def trained(run: RunDirectory, classes: int) -> nn.Module:
    """The network of a run with its latent weights; a checkpoint of SGD."""
    model = models.create(run.read_config().network, classes)
    run.load_model(model)
    state = torch.load(run.path / "checkpoints" / "last.pt", weights_only=True)["optimizer"]
    weights = [p for p in model.parameters() if p.ndim > 1]
    with torch.no_grad():
        for index, weight in zip(state["param_groups"][0]["params"], weights, strict=True):
            weight.copy_(state["state"][index]["feather_latent"])
    return model


def prune(run: RunDirectory, classes: int, sparsity: float, allocation: str) -> nn.Module:
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


def dense_systems(model: nn.Module, x: Tensor, threads: int) -> dict[str, System]:
    """What else runs the network here, for inputs as large as `x`."""
    torch._inductor.config.freezing = True  # weights are constants to it, as to the others
    systems: dict[str, System] = {"PyTorch": model}
    systems["torch.compile"] = torch.compile(model, dynamic=False)
    try:
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(path, options)
        name = session.get_inputs()[0].name
        systems["onnxruntime"] = lambda x: session.run(None, {name: x.numpy()})
    except ImportError:
        pass
    try:
        import openvino
    except ImportError:
        return systems
    graph = openvino.convert_model(model, example_input=x, input=list(x.shape))
    core = openvino.Core()
    for label, precision in (("OpenVINO f32", "f32"), ("OpenVINO default", None)):
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        settings["ENABLE_CPU_PINNING"] = False  # of threads that others in the process use too
        if precision:
            settings["INFERENCE_PRECISION_HINT"] = precision
        request = core.compile_model(graph, "CPU", settings).create_infer_request()
        systems[label] = lambda x, request=request: request.infer([x.numpy()], share_inputs=True)
    return systems


def dense_calls(model: nn.Module, x: Tensor, threads: int) -> dict[str, dict[str, Call]]:
    """By system: the ways to run it on a batch."""
    calls: dict[str, dict[str, Call]] = {
        name: {"whole": partial(run, x)} for name, run in dense_systems(model, x, threads).items()
    }
    if len(x) > 1:
        for name, run in dense_systems(model, x[:1], threads).items():
            calls[name]["image by image"] = partial(image_by_image, run, x)
    return calls


def dense_times(calls: dict[str, dict[str, Call]], burst: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each system in each of its ways."""
    flat = [call for ways in calls.values() for call in ways.values()]
    with torch.inference_mode():
        times = iter(alternate(flat, rounds=3, burst=burst))
    return {name: {way: next(times) for way in ways} for name, ways in calls.items()}


def image_by_image(run: System, x: Tensor) -> None:
    for image in x.split(1):
        run(image)


def peak() -> float:
    """Multiply-adds in 1e9 per second of one core, on registers alone."""
    w = vector_widths()[0]
    v, chains, rounds = f"<{w} x float>", 12, 20_000_000
    phis = "\n".join(
        f"  %a{i} = phi {v} [ zeroinitializer, %entry ], [ %b{i}, %loop ]" for i in range(chains)
    )
    fmas = "\n".join(
        f"  %b{i} = call {v} @llvm.fma.v{w}f32({v} %a{i}, {v} %x, {v} %x)" for i in range(chains)
    )
    sums = "\n".join(
        f"  %s{i} = fadd {v} {f'%s{i - 1}' if i else 'zeroinitializer'}, %b{i}"
        for i in range(chains)
    )
    code = f"""
declare {v} @llvm.fma.v{w}f32({v}, {v}, {v})
define void @peak(ptr %p, i64 %n) {{
entry:
  %x = load {v}, ptr %p, align 4
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %j, %loop ]
{phis}
{fmas}
  %j = add i64 %i, 1
  %more = icmp ult i64 %j, %n
  br i1 %more, label %loop, label %exit
exit:
{sums}
  store {v} %s{chains - 1}, ptr %p, align 4
  ret void
}}"""
    binding = llvm()
    module = binding.parse_assembly(code)
    engine = binding.create_mcjit_compiler(module, machine())
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(
        engine.get_function_address("peak")
    )
    memory = np.zeros(w, np.float32)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        function(memory.ctypes.data, rounds)
        best = min(best, time.perf_counter() - start)
    return rounds * chains * w / best / 1e9


def breakdown(module: feather.runtime.SparseModule, x: Tensor) -> dict[str, float]:
    """Milliseconds by kind of step, each step timed by itself in the order of the network."""
    bound = module._for_batch(x)
    workspace = Workspace(bound)
    workspace(x)
    calls: list[tuple[str, Callable[[list[Any]], None]]] = []
    for call in workspace.calls:
        if not call.steps:
            calls.append(("PyTorch", call.run))
        calls += [(kind(step), workspace.native([step])) for step in call.steps]
    rounds: dict[str, list[float]] = defaultdict(list)
    for _ in range(15):
        spent: Counter[str] = Counter()
        values = list(workspace.slots)
        values[workspace.inputs[0]] = x
        for name, run in calls:
            start = time.perf_counter()
            run(values)
            spent[name] += time.perf_counter() - start
        for name, seconds in spent.items():
            rounds[name].append(1e3 * seconds)
    return {name: float(np.median(times)) for name, times in rounds.items()}


def kind(step: Sparse | Copy) -> str:
    if isinstance(step, Copy):
        return "copies"
    if isinstance(step.layer, MaxPool):
        return "pooling"
    if step.layer.linear:
        return "linear"
    size = "x".join(map(str, step.layer.weight.shape[2:]))
    return f"{'depthwise ' * (step.layer.groups > 1)}{size}"


def multiply_adds(module: feather.runtime.SparseModule) -> int:
    """Those of nonzero weights in layers that run sparse, for one image."""
    return sum(
        len(step.taps.values) * step.out.height * step.out.width
        for step in module.plan.steps
        if isinstance(step, Sparse) and not isinstance(step.layer, MaxPool)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, action="append", required=True)
    parser.add_argument("--classes", type=int, default=10, help="of the runs")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--allocation", nargs="+", default=list(ALLOCATIONS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--at-a-time", type=int, help="images of a batch, see compile_sparse")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    here = provenance(torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    choices: dict[Any, Any] = {}  # made with the first number of threads
    top = peak()
    print(f"{here['hardware']['cpu']}: {top:.1f} G multiply-adds per second and core at most")
    print(f"{here['versions']}, commit {here['commit']}")
    command = " ".join(["python benchmarks/inference.py", *sys.argv[1:]])
    print(f"{command}\n")
    for path in options.run:
        run = RunDirectory(path)
        network = run.read_config().network
        for threads in options.threads:
            torch.set_num_threads(threads)
            for batch in options.batch:
                torch._dynamo.reset()  # it gives up on a network that it has met too often
                x = torch.randn(batch, 3, options.size, options.size)
                second = torch.randn_like(x)
                head = {"network": network, "threads": threads, "batch": batch}
                reference = prune(run, options.classes, 0.95, "global")
                calls = dense_calls(reference, x, threads)
                dense = dense_times(calls, burst=3 if batch == 1 else 1)
                best = {name: min(found, key=found.__getitem__) for name, found in dense.items()}
                rivals = [name for name in calls if "OpenVINO" in name] or ["PyTorch"]
                others_ms: dict[str, list[float]] = defaultdict(list)
                rows.append(head | {"system": "dense", "ms": dense})
                print(f"{network}, {threads} thread(s), batch {batch}:")
                shown = (f"{n} {dense[n][way]:.2f} ({way})" for n, way in best.items())
                print("  " + ", ".join(shown) + " ms")
                for allocation in options.allocation:
                    for sparsity in options.sparsity:
                        model = prune(run, options.classes, sparsity, allocation)
                        key = (network, len(x[: options.at_a_time]), allocation, sparsity)
                        module = feather.compile_sparse(
                            model,
                            x[: options.at_a_time],
                            threads=threads,
                            choices=choices.get(key),
                            at_a_time=options.at_a_time,
                        )
                        choices.setdefault(key, module.choices)
                        with torch.inference_mode():
                            wanted, found, unlike = model(x), module(x), model(second)
                            turns = [partial(module, x), *(calls[n][best[n]] for n in rivals)]
                            ms, *others = alternate(turns, rounds=7 if batch == 1 else 3)
                        for name, took in zip(rivals, others, strict=True):
                            others_ms[name].append(took)
                        largest = wanted.abs().max()
                        error = float((wanted - found).abs().max() / largest)
                        if not error < BOUND:
                            sys.exit(f"{network} at {sparsity}: an error of {error:.0e}")
                        used = multiply_adds(module) * batch / ms / 1e6
                        row = head | {
                            "system": "ours",
                            "allocation": allocation,
                            "sparsity": sparsity,
                            "ms": ms,
                            "rivals_ms": dict(zip(rivals, others, strict=True)),
                            "ways": best,
                            "error": error,
                            "differs": float((wanted - unlike).abs().max() / largest),
                            "sparse_layers": sum(c.sparse for c in module.choices.values()),
                            "layers": len(module.choices),
                            "gmacs_per_s": used,
                            "of_peak": used / top / threads,
                            "at_a_time": options.at_a_time,
                            "parts_ms": breakdown(module, x[: options.at_a_time]),
                        }
                        rows.append(row)
                        faster = ", ".join(
                            f"{other / ms:.2f} x {name}"
                            for name, other in zip(rivals, others, strict=True)
                        )
                        parts = ", ".join(f"{k} {v:.2f}" for k, v in row["parts_ms"].items())
                        print(
                            f"  ours {allocation:6} {100 * sparsity:5.1f} %: {ms:8.2f} ms, "
                            f"{faster}, error {error:.0e} "
                            f"where images differ by {row['differs']:.0e}, "
                            f"{row['sparse_layers']} of {row['layers']} layers sparse, "
                            f"{used:5.1f} G/s = {100 * row['of_peak']:.0f} % of peak; {parts}",
                            flush=True,
                        )
                        if options.json:
                            result = {
                                "command": command,
                                **here,
                                "peak_gmacs_per_s": top,
                                "rows": rows,
                            }
                            options.json.write_text(json.dumps(result, indent=1) + "\n")
                shown = (f"{name} {np.median(ms):.2f}" for name, ms in others_ms.items())
                print(f"  in these turns, median: {', '.join(shown)} ms\n")


if __name__ == "__main__":
    main()
