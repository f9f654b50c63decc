"""The official implementation of Feather, imported at run time from a checkout.

It wraps modules: `Pruner(model, device, final_rate, nbatches, epochs)` replaces every convolution
and linear layer, `update_thresh()` is called before each step, `desparsify()` unwraps at the end.
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

RENAMED = {"--peer": "--reference"}  # options of benchmarks that use the official implementation
REFERENCE_HELP = "checkout of the official implementation"


def load_official(checkout: Path) -> ModuleType:
    """Import the module `sparse_utils` of a checkout.

    Raises:
        SystemExit: the folder does not contain it.
    """
    file = checkout / "sparse_utils.py"
    if not file.is_file():
        raise SystemExit(
            f"--reference {checkout}: no sparse_utils.py. Give the folder of the checkout."
        )
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
    """Wrap a model by the official Pruner, in place.

    Raises:
        SystemExit: it prunes other weights than torch-feather.
    """
    prunable = sum(p.parameter.numel() for p in find_prunable(model))
    pruner = official.Pruner(
        model, device=device, final_rate=sparsity, nbatches=steps_per_epoch, epochs=epochs
    )
    if pruner.prunable_weights_cnt != prunable:
        raise SystemExit(
            f"The official implementation prunes {pruner.prunable_weights_cnt} weights of this "
            f"network, torch-feather {prunable}. They cannot be compared on it."
        )
    return pruner


def commit(checkout: Path) -> str | None:
    """Return the commit of a checkout; None if git cannot determine it."""
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def recorded_command(argv: Sequence[str] | None, names: Mapping[str, str]) -> str:
    """Return the command line for a record, with names in place of paths of this machine.

    Args:
        argv: the command line; None for that of the process.
        names: path to its name.
    """
    words = sys.argv if argv is None else [sys.argv[0], *argv]
    for path, name in names.items():
        words = [name if word == path else word for word in words]
        words = [
            word.removesuffix(path) + name if word.endswith(f"={path}") else word for word in words
        ]
    return shlex.join(["python", *words])
