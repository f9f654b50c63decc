"""Time and memory of the engine in one step, measured separately from training."""

from __future__ import annotations

import os
from typing import Any

import engine_parts
import numpy as np
import torch
from timed_call import timed

import torch_feather as feather

WARMUP = 3  # repetitions before the measured ones: memory is allocated, kernels are chosen
REPEATS = 20
CACHES = 64 << 20  # bytes; larger than the CPU caches


def measure(sparsifier: feather.Sparsifier, device: torch.device) -> dict[str, Any]:
    """Return the median milliseconds of the engine in one step, and its memory.

    Caches are emptied before each part, as forward and backward passes leave them. `threshold`,
    `effective_weights`, `copy` and `checks` are parts of `before` and `after`.
    """
    calls = engine_parts.step_calls(sparsifier)
    parts = engine_parts.step_parts(sparsifier) | engine_parts.copy_parts(sparsifier)
    caches = torch.empty(CACHES // 4, device=device)
    samples: dict[str, list[float]] = {name: [] for name in calls | parts}
    with torch.no_grad():
        for i in range(WARMUP + REPEATS):
            for name, call in (calls | parts).items():
                caches.fill_(i)
                elapsed = timed(call, device)
                if i >= WARMUP:
                    samples[name].append(elapsed)
    medians = {name: float(np.median(values)) for name, values in samples.items()}
    return {
        "ms": {name: medians[name] for name in calls},
        "sum_ms": sum(medians[name] for name in calls),
        "parts_ms": {name: medians[name] for name in parts},
        "memory": memory(sparsifier, device),
    }


def memory(sparsifier: feather.Sparsifier, device: torch.device) -> dict[str, int]:
    """Return bytes of the prunable weights, their latent copy, the method's state, temporaries."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        engine_parts.step(sparsifier)
        transient = torch.cuda.max_memory_allocated(device) - before
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints to stderr
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            engine_parts.step(sparsifier)
        assert profile.profiler is not None
        events = profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        transient = max(np.cumsum([0, *(change for _, change in changes)]).tolist())
    return {
        "weights": sum(p.nbytes for p in engine_parts.parameters(sparsifier)),
        "latent": sum(w.nbytes for w in engine_parts.latent_weights(sparsifier)),
        "method": engine_parts.method_bytes(sparsifier),
        "transient": int(transient),
    }
