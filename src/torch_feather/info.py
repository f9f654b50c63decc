"""How the engine computes in this process."""

from __future__ import annotations

from typing import Any

import torch

from .weights.compiled import kernels


def engine_info() -> dict[str, Any]:
    """Return how a step on a CPU is computed in this process.

    Returns:
        `passes`: 'compiled' if the passes over float32 weights are compiled loops (llvmlite is
        installed), otherwise 'plain'. `vector`: float32 numbers per vector of the compiled loops, 0
        without them. `threads`: number of threads.

    Example:
        >>> engine_info()["passes"] in ("compiled", "plain")
        True
    """
    found = kernels()
    return {
        "passes": "plain" if found is None else "compiled",
        "vector": 0 if found is None else found.width,
        "threads": torch.get_num_threads(),
    }
