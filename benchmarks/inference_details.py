"""Peak arithmetic of the CPU, and the time and work of a compiled network by kind of layer.

This file alone uses internals of the CPU runtime.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

import torch_feather as feather
from torch_feather.runtime.kernels import host, llvm
from torch_feather.runtime.plan import Copy, Operation, Sparse
from torch_feather.runtime.steps import Attention
from torch_feather.runtime.workspace import Workspace


def peak() -> float:
    """Return the multiply-adds per second of one core on registers, in 1e9."""
    w = host().widths[0]
    v, chains, count = f"<{w} x float>", 12, 20_000_000
    phis = "\n".join(
        f"  %a{i} = phi {v} [ zeroinitializer, %entry ], [ %b{i}, %loop ]" for i in range(chains)
    )
    fmas = "\n".join(
        f"  %b{i} = call {v} @llvm.fmuladd.v{w}f32({v} %a{i}, {v} %x, {v} %x)"
        for i in range(chains)
    )
    sums = "\n".join(
        f"  %s{i} = fadd {v} {f'%s{i - 1}' if i else 'zeroinitializer'}, %b{i}"
        for i in range(chains)
    )
    code = f"""
declare {v} @llvm.fmuladd.v{w}f32({v}, {v}, {v})
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
    engine = binding.create_mcjit_compiler(module, host().machine())
    engine.finalize_object()
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(
        engine.get_function_address("peak")
    )
    memory = np.zeros(w, np.float32)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        function(memory.ctypes.data, count)
        best = min(best, time.perf_counter() - start)
    return count * chains * w / best / 1e9


def breakdown(module: feather.runtime.SparseModule, x: Tensor) -> dict[str, float]:
    """Return the milliseconds by kind of step; steps are timed one by one in network order.

    If the network processes the batch in chunks, they are those of the first chunk.
    """
    plan = module._for_sizes(x).pool.plan
    workspace, x = Workspace(plan), x[: plan.batch]
    workspace(x)
    calls: list[tuple[str, Callable[[list[Any]], None]]] = []
    for call in workspace.calls:
        if not call.steps:
            calls.append(("PyTorch", call.run))
        calls += [(kind(step), workspace.native([step])) for step in call.steps]
    repetitions: dict[str, list[float]] = defaultdict(list)
    for _ in range(15):
        spent: Counter[str] = Counter()
        values = list(workspace.values)
        values[workspace.inputs[0]] = x
        for name, run in calls:
            start = time.perf_counter()
            run(values)
            spent[name] += time.perf_counter() - start
        for name, seconds in spent.items():
            repetitions[name].append(1e3 * seconds)
    return {name: float(np.median(times)) for name, times in repetitions.items()}


def kind(step: Sparse | Copy | Operation | Attention) -> str:
    """Return the kind of a step, such as `1x1` or `copies`."""
    if isinstance(step, Copy):
        return "copies"
    if isinstance(step, Operation):
        return step.name
    if isinstance(step, Attention):
        return "attention"
    if step.layer.pools:
        return "pooling"
    if step.layer.linear:
        return "linear"
    size = "x".join(map(str, step.layer.weight.shape[2:]))
    return f"{'depthwise ' * (step.layer.groups > 1)}{size}"


def multiply_adds(module: feather.runtime.SparseModule) -> int:
    """Return the multiply-adds of nonzero weights in sparse layers, for one image."""
    return sum(
        len(step.taps.values) * step.out.height * step.out.width
        for step in module.plan.steps
        if isinstance(step, Sparse) and not step.layer.pools
    )
