"""The official implementation of Feather, imported at run time from a checkout of it.

It wraps modules: `Pruner(model, device, final_rate, nbatches, epochs)` replaces every convolution
and linear layer, `update_thresh()` goes before each step, `desparsify()` unwraps at the end.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from torch_feather.prunable import find_prunable


def load_official(checkout: Path) -> ModuleType:
    """Its module `sparse_utils`. SystemExit where `checkout` does not hold it."""
    file = checkout / "sparse_utils.py"
    if not file.is_file():
        raise SystemExit(f"--peer {checkout}: no sparse_utils.py there; name the checkout's folder")
    spec = importlib.util.spec_from_file_location("official_sparse_utils", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrap(
    official: ModuleType,
    model: nn.Module,
    device: torch.device,
    *,
    sparsity: float,
    steps_per_epoch: int,
    epochs: int,
) -> Any:
    """Its Pruner around `model`, in place; SystemExit if it would prune other weights than ours."""
    ours = sum(p.parameter.numel() for p in find_prunable(model))
    pruner = official.Pruner(
        model, device=device, final_rate=sparsity, nbatches=steps_per_epoch, epochs=epochs
    )
    if pruner.prunable_weights_cnt != ours:
        raise SystemExit(
            f"the official implementation prunes {pruner.prunable_weights_cnt} weights of this "
            f"network, ours {ours}: the two cannot be compared on it"
        )
    return pruner


def commit(checkout: Path) -> str | None:
    """Which version of it this is; None where git cannot tell."""
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def recorded_command(argv: Sequence[str] | None, names: Mapping[str, str]) -> str:
    """The command line for a record, with names in place of one machine's paths (path: name)."""
    words = sys.argv if argv is None else [sys.argv[0], *argv]
    for path, name in names.items():
        words = [name if word == path else word for word in words]
        words = [
            word.removesuffix(path) + name if word.endswith(f"={path}") else word for word in words
        ]
    return shlex.join(["python", *words])
