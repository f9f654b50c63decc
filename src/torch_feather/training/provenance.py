"""Versions, commit and hardware, stored with every result."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device) -> dict[str, Any]:
    """Return `versions`, `commit` and `hardware` as plain values.

    Args:
        device: the device that computes.

    Returns:
        A dict; `commit` is None if this package is not in a git checkout, and ends with `+` if
        tracked files were edited.

    Example:
        >>> sorted(provenance(torch.device("cpu")))
        ['commit', 'hardware', 'versions']
    """
    return {"versions": _versions(), "commit": _commit(), "hardware": _hardware(device)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch-feather", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source folder that is not installed
            found[package] = "unknown"
    return found


def _commit() -> str | None:
    """Return the commit of the checkout that this file is in."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        edited = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if edited else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _cpu_name() -> str:
    """Return the model and the vector instructions that PyTorch uses: some models hide theirs."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
